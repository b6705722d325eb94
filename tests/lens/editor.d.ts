// Types of the parts of Lens Studio's editor API (5.15) that the plugin uses, after the API reference.
// They replace Snap's own declarations, which this project may not distribute.

declare class vec3 {
    constructor(x: number, y: number, z: number);
    x: number;
    y: number;
    z: number;
}

declare const console: {
    log(message: string): void;
    warn(message: string): void;
    error(message: string): void;
};

interface ImportMeta {
    resolve(path: string): string;
}

declare namespace Editor {
    function isNull(object: any): boolean;

    class Path {
        constructor(path: string);
        toString(): string;
    }

    class Transform {
        constructor(position: vec3, rotation: vec3, scale: vec3);
        position: vec3;
        rotation: vec3;
        scale: vec3;
    }

    // ---- plugins

    interface InterfaceId<T> {
        readonly describes?: T;
    }

    interface IPlugin {
        readonly id: string;
    }

    interface IPluginDescriptor {
        readonly id: string;
        readonly name: string;
    }

    interface PluginSystem {
        readonly descriptors: IPluginDescriptor[];
        create(descriptor: IPluginDescriptor): IPlugin;
        findInterface<T>(id: InterfaceId<T>): T;
    }

    interface IGuard {
        dispose(): void;
    }

    interface IContext {
        isOfType(type: string): boolean;
    }

    class ContextAction {
        id: string;
        caption: string;
        description: string;
        group: string[];
        apply: () => void;
    }

    interface IContextActionRegistry {
        registerAction(action: (context: IContext) => ContextAction): IGuard;
    }
    const IContextActionRegistry: InterfaceId<IContextActionRegistry>;

    // ---- the project

    namespace Model {
        interface IModel {
            readonly project: Project;
        }
        const IModel: InterfaceId<IModel>;

        interface Entity {
            readonly id: { toString(): string };
            isOfType(type: string): boolean;
        }

        interface Project {
            readonly assetManager: AssetManager;
            readonly history: { executeAsGroup(name: string, change: () => void): void };
            readonly scene: Assets.Scene;
        }

        interface ImportResult {
            readonly primary: Assets.Asset;
        }

        interface AssetManager {
            readonly assets: Assets.Asset[];
            createNativeAsset(type: string, baseName: string, destination: Path): Assets.Asset;
            importExternalFileAsync(source: Path, destination?: Path): Promise<ImportResult>;
        }

        interface SceneObject extends Entity {
            name: string;
            localTransform: Transform;
            addComponent<K extends keyof ComponentNameMap>(type: K): ComponentNameMap[K];
            getComponent<K extends keyof ComponentNameMap>(type: K): ComponentNameMap[K] | null;
        }
    }

    namespace Assets {
        interface Asset extends Model.Entity {
            name: string;
        }

        interface Material extends Asset {}

        interface Texture extends Asset {}

        interface RenderTarget extends Texture {
            useScreenResolution: boolean;
        }

        interface Scene extends Asset {
            readonly mainCamera: Components.Camera | null;
            readonly sceneObjects: Model.SceneObject[];
            captureTarget: RenderTarget;
            liveTarget: RenderTarget;
            createSceneObject(name: string): Model.SceneObject;
        }
    }

    // ---- components

    namespace Components {
        interface Component extends Model.Entity {
            enabled: boolean;
        }

        interface Camera extends Component {
            fov: number; // degrees, vertical
            renderTarget: Assets.RenderTarget;
        }

        enum StretchMode {
            Fill,
            FillAndCut,
            Fit,
            FitHeight,
            FitWidth,
            Stretch,
        }

        interface Image extends Component {
            materials: Assets.Material[];
            stretchMode: StretchMode;
        }

        interface ScriptComponent extends Component {
            [input: string]: any;
            readonly inputNames: string[];
            scriptAsset: Assets.Asset;
        }

        interface Text extends Component {
            text: string;
            size: number;
        }
    }
}

interface ComponentNameMap {
    Camera: Editor.Components.Camera;
    Image: Editor.Components.Image;
    ScriptComponent: Editor.Components.ScriptComponent;
    Text: Editor.Components.Text;
}

declare module "LensStudio:Preset" {
    export class Preset implements Editor.IPlugin {
        readonly id: string;
        createAsync(destination: Editor.Path | Editor.Model.SceneObject): Promise<Editor.Model.Entity>;
    }
}

declare module "LensStudio:CoreService" {
    export class CoreService {
        constructor(pluginSystem: Editor.PluginSystem, descriptor?: object);
        readonly pluginSystem: Editor.PluginSystem;
        guards?: Editor.IGuard[];
        start(): void;
        stop(): void;
    }
}
