// Puts the light field's scene together from the project's assets, with a right click > Rebuild Neural
// Light Field in the Scene Hierarchy or the Asset Browser. Two uses:
// - it adds an Image, with a material that only the editor can make, so that the image keeps its
//   proportions instead of filling the screen;
// - it is the way out when Lens Studio did not take the generated scene.
// What is there already is kept and completed; nothing is removed. One undo takes it all back.

import { CoreService } from "LensStudio:CoreService";

const LIGHT_FIELD = "Neural Light Field";
const CAPTION = "Rebuild Neural Light Field";
const SCRIPT = { name: "NeuralLightField", file: "NeuralLightField.js", type: "JavaScriptAsset" };
// by the script's input; files as they lie in the generated project's Assets
const MODELS = {
    sampler: { name: "Sampler", file: "Models/Sampler.onnx", type: "MLAsset" },
    embedder: { name: "Embedder", file: "Models/Embedder.onnx", type: "MLAsset" },
    student: { name: "Student", file: "Models/Student.onnx", type: "MLAsset" },
};
const IMAGE_MATERIAL = "Com.Snap.MaterialPreset.ImageMaterialPreset"; // comes with Lens Studio

// The camera stands 40 in front of the image, which is 28 wide, as wide as a phone's screen there.
const CAMERA_DISTANCE = 40;
const FIELD_OF_VIEW_DEGREES = 63.541019;
const IMAGE_SIZE = 28;
const MESSAGE_SIZE = 45;

export class RebuildNeuralLightField extends CoreService {
    static descriptor() {
        return {
            id: "nelf.RebuildNeuralLightField",
            name: CAPTION,
            description: "Puts the neural light field's scene together from the project's assets.",
            dependencies: [Editor.Model.IModel, Editor.IContextActionRegistry],
        };
    }

    start() {
        const registry = this.pluginSystem.findInterface(Editor.IContextActionRegistry);
        // An action lives as long as its guard is held.
        this.guards = [registry.registerAction((context) => this.action(context))];
    }

    stop() {
        this.guards = [];
    }

    /** @param {Editor.IContext} context */
    action(context) {
        const action = new Editor.ContextAction();
        if (!context.isOfType("ObjectContext") && !context.isOfType("AssetContext")) {
            return action; // an action without a caption is not shown
        }
        action.id = "nelf.Action.RebuildNeuralLightField";
        action.caption = CAPTION;
        action.description = "Adds what is missing of the light field's scene";
        action.group = [];
        action.apply = () => {
            this.rebuild().then(
                () => console.log("[NeuralLightField] The scene is complete."),
                (error) => console.error("[NeuralLightField] " + error.message),
            );
        };
        return action;
    }

    async rebuild() {
        const project = this.pluginSystem.findInterface(Editor.Model.IModel).project;
        const manager = project.assetManager;
        const script = await this.assetOf(manager, SCRIPT);
        const inputs = {
            sampler: await this.assetOf(manager, MODELS.sampler),
            embedder: await this.assetOf(manager, MODELS.embedder),
            student: await this.assetOf(manager, MODELS.student),
        };
        const lightField = lightFieldIn(project.scene, script);
        const image = lightField && component(lightField, "Image");
        const material =
            image && image.materials.length > 0 ? image.materials[0] : await this.imageMaterial();
        project.history.executeAsGroup(CAPTION, () => {
            assemble(project, script, inputs, material);
        });
    }

    // The project's own asset of that name, else the one of the generated project that holds the plugin.
    /** @param {Editor.Model.AssetManager} manager @param {AssetFile} asked */
    async assetOf(manager, asked) {
        const present = manager.assets.find(
            (asset) => asset.name === asked.name && asset.isOfType(asked.type),
        );
        if (present) {
            return present;
        }
        const path = import.meta.resolve("../../Assets/" + asked.file);
        let imported = null;
        try {
            imported = await manager.importExternalFileAsync(new Editor.Path(path));
        } catch (error) {
            console.warn("[NeuralLightField] " + path + " was not imported: " + error);
        }
        if (imported === null || Editor.isNull(imported.primary)) {
            throw new Error(
                "There is no asset " + asked.name + ". Copy Assets/" + asked.file +
                    " and its .meta from the generated project into this project's Assets.",
            );
        }
        if (asked === MODELS.student) {
            console.warn(
                "[NeuralLightField] Student was imported without its .meta: select it and set the " +
                    "scale of its output to 255 on all three channels, or the image stays black.",
            );
        }
        return imported.primary;
    }

    // Made by Lens Studio's own preset, since a shader is a file that only the editor writes.
    async imageMaterial() {
        const descriptor = this.pluginSystem.descriptors.find((each) => each.id === IMAGE_MATERIAL);
        if (!descriptor) {
            console.warn(
                "[NeuralLightField] This Lens Studio has no preset " + IMAGE_MATERIAL + ": the " +
                    "image will fill the screen. Add an Image component to " + LIGHT_FIELD + ".",
            );
            return null;
        }
        const plugin = this.pluginSystem.create(descriptor);
        const preset = /** @type {import("LensStudio:Preset").Preset} */ (plugin);
        const material = await preset.createAsync(new Editor.Path(""));
        return /** @type {Editor.Assets.Material} */ (material);
    }
}

/**
 * @typedef {{name: string, file: string, type: string}} AssetFile
 * @param {Editor.Model.Project} project
 * @param {Editor.Assets.Asset} script
 * @param {Record<string, Editor.Assets.Asset>} inputs
 * @param {Editor.Assets.Material | null} material
 */
function assemble(project, script, inputs, material) {
    const scene = project.scene;
    const target = renderTarget(project);
    if (Editor.isNull(scene.mainCamera)) {
        const camera = newObject(scene, "Camera Object", CAMERA_DISTANCE, 1).addComponent("Camera");
        camera.renderTarget = target;
        camera.fov = FIELD_OF_VIEW_DEGREES;
    }
    const lightField = lightFieldIn(scene, script) || newObject(scene, LIGHT_FIELD, 0, IMAGE_SIZE);
    if (material !== null) {
        const image = component(lightField, "Image") || lightField.addComponent("Image");
        image.materials = [material];
        image.stretchMode = Editor.Components.StretchMode.Fit;
    }
    const controller =
        component(lightField, "ScriptComponent") || lightField.addComponent("ScriptComponent");
    controller.scriptAsset = script;
    for (const name in inputs) {
        controller[name] = inputs[name];
    }
    controller.renderTarget = target;
    if (Editor.isNull(controller.message)) {
        const text = newObject(scene, "Message", 1, 1).addComponent("Text");
        text.text = "";
        text.size = MESSAGE_SIZE;
        controller.message = text;
    }
}

/** @param {Editor.Model.Project} project */
function renderTarget(project) {
    const scene = project.scene;
    if (Editor.isNull(scene.captureTarget)) {
        const made = project.assetManager.createNativeAsset(
            "RenderTarget",
            "RenderTarget",
            new Editor.Path(""),
        );
        scene.captureTarget = /** @type {Editor.Assets.RenderTarget} */ (made);
        scene.liveTarget = scene.captureTarget;
    }
    return scene.captureTarget;
}

// The object that runs our script, else one of its name; null when there is none.
/** @param {Editor.Assets.Scene} scene @param {Editor.Assets.Asset} script */
function lightFieldIn(scene, script) {
    const runs = scene.sceneObjects.find((object) => {
        const controller = component(object, "ScriptComponent");
        return (
            controller !== null &&
            !Editor.isNull(controller.scriptAsset) &&
            controller.scriptAsset.id.toString() === script.id.toString()
        );
    });
    return runs || scene.sceneObjects.find((object) => object.name === LIGHT_FIELD) || null;
}

/**
 * @template {keyof ComponentNameMap} K
 * @param {Editor.Model.SceneObject} object
 * @param {K} type
 * @returns {ComponentNameMap[K] | null}
 */
function component(object, type) {
    const found = object.getComponent(type);
    return Editor.isNull(found) ? null : found;
}

/** @param {Editor.Assets.Scene} scene @param {string} name @param {number} z @param {number} size */
function newObject(scene, name, z, size) {
    const object = scene.createSceneObject(name);
    object.localTransform = new Editor.Transform(
        new vec3(0, 0, z),
        new vec3(0, 0, 0),
        new vec3(size, size, size),
    );
    return object;
}
