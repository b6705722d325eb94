// Types of the parts of Lens Studio's scripting API (5.x) that the controller script uses, after the API
// reference. They replace Snap's own StudioLib.d.ts, which this project may not distribute.

interface ScriptObject {
    getTypeName(): string;
}

interface vec2 extends ScriptObject {
    x: number;
    y: number;
}

interface vec3 extends ScriptObject {
    x: number;
    y: number;
    z: number;
}

declare function print(message: unknown): void;

declare namespace global {
    let touchSystem: TouchDataProvider;
}

interface TouchDataProvider extends ScriptObject {
    touchBlocking: boolean;
}

// ---- assets

interface Asset extends ScriptObject {
    name: string;
}

interface MLAsset extends Asset {}

interface Texture extends Asset {
    control: TextureProvider;
}

interface TextureProvider extends ScriptObject {}

interface RenderTargetProvider extends TextureProvider {
    inputTexture: Texture;
    clearColorOption: ClearColorOption;
}

declare enum ClearColorOption {
    None,
    Background,
    CustomColor,
    CustomTexture,
}

interface Pass extends ScriptObject {
    [parameter: string]: any;
}

// ---- scene objects and components

interface ComponentNameMap {
    "Component.Image": Image;
    MLComponent: MLComponent;
}

interface SceneObject extends ScriptObject {
    createComponent<K extends keyof ComponentNameMap>(type: K): ComponentNameMap[K];
    getComponent<K extends keyof ComponentNameMap>(type: K): ComponentNameMap[K];
}

interface Component extends ScriptObject {
    enabled: boolean;
    getSceneObject(): SceneObject;
}

interface Image extends Component {
    mainPass: Pass;
    getMaterialsCount(): number;
}

interface Text extends Component {
    text: string;
}

interface ScriptComponent extends Component {
    [input: string]: any;
    createEvent<K extends keyof EventNameMap>(type: K): EventNameMap[K];
}

// the inputs that the script's //@input lines declare
interface LightFieldInputs {
    sampler: MLAsset;
    embedder: MLAsset;
    student: MLAsset;
    renderTarget: Texture;
    message: Text | null;
}

declare const script: ScriptComponent & LightFieldInputs;

// ---- machine learning

interface BasePlaceholder extends ScriptObject {
    readonly name: string;
    readonly shape: vec3;
}

interface InputPlaceholder extends BasePlaceholder {
    readonly data: Float32Array;
    texture: Texture;
}

interface OutputPlaceholder extends BasePlaceholder {
    readonly data: Float32Array;
    readonly texture: Texture;
    mode: MachineLearning.OutputMode;
}

interface MLComponent extends Component {
    model: MLAsset;
    inferenceMode: MachineLearning.InferenceMode;
    readonly state: MachineLearning.ModelState;
    onLoadingFinished: () => void;
    onLoadingFailed: (message: string) => void;
    onRunningFinished: () => void;
    onRunningFailed: (message: string) => void;
    build(placeholders: BasePlaceholder[]): void;
    getInput(name: string): InputPlaceholder;
    getOutput(name: string): OutputPlaceholder;
    runImmediate(sync: boolean): void;
    runScheduled(
        recurring: boolean,
        startTiming: MachineLearning.FrameTiming,
        endTiming: MachineLearning.FrameTiming,
    ): void;
}

declare namespace MachineLearning {
    enum FrameTiming {
        None,
        Update,
        LateUpdate,
        OnRender,
    }
    enum InferenceMode {
        CPU,
        GPU,
        Accelerator,
        Auto,
    }
    enum ModelState {
        Running,
        Loading,
        Idle,
        NotReady,
    }
    enum OutputMode {
        Texture,
        Data,
    }
}

// ---- events

interface SceneEvent extends ScriptObject {
    bind(callback: (event: this) => void): void;
    enabled: boolean;
}

interface OnStartEvent extends SceneEvent {}

interface UpdateEvent extends SceneEvent {
    getDeltaTime(): number;
}

// positions from (0, 0), top left, to (1, 1), bottom right
interface TouchEvent extends SceneEvent {
    getTouchId(): number;
    getTouchPosition(): vec2;
}

interface TouchStartEvent extends TouchEvent {}

interface TouchMoveEvent extends TouchEvent {}

interface TouchEndEvent extends TouchEvent {}

interface EventNameMap {
    OnStartEvent: OnStartEvent;
    TouchEndEvent: TouchEndEvent;
    TouchMoveEvent: TouchMoveEvent;
    TouchStartEvent: TouchStartEvent;
    UpdateEvent: UpdateEvent;
}
