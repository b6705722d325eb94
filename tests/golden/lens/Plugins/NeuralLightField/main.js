// Editor plugin that assembles the light field's scene from the project's assets: right click > Rebuild
// Neural Light Field in the Scene Hierarchy or the Asset Browser. It has two uses:
// - It adds an Image with a material, which only the editor can create, so that the image keeps its
//   proportions instead of filling the screen.
// - It replaces the generated scene if Lens Studio does not accept that scene.
// Existing objects are kept and completed; nothing is removed. One undo reverts all changes.

import { CoreService } from "LensStudio:CoreService";

const LIGHT_FIELD = "Neural Light Field";
const CAPTION = "Rebuild Neural Light Field";
const SCRIPT = { name: "NeuralLightField", file: "NeuralLightField.js", type: "JavaScriptAsset" };
// The models by the name of the script's input. Paths are relative to the generated project's Assets.
const MODELS = {
    sampler: { name: "Sampler", file: "Models/Sampler.onnx", type: "MLAsset" },
    embedder: { name: "Embedder", file: "Models/Embedder.onnx", type: "MLAsset" },
    student: { name: "Student", file: "Models/Student.onnx", type: "MLAsset" },
};
const IMAGE_MATERIAL = "Com.Snap.MaterialPreset.ImageMaterialPreset"; // a part of Lens Studio

// The camera is 40 units in front of the image. The image is 28 wide, the width of a phone's screen at
// this distance.
const CAMERA_DISTANCE = 40;
const FIELD_OF_VIEW_DEGREES = 63.541019;
const IMAGE_SIZE = 28;
const MESSAGE_SIZE = 45;

export class RebuildNeuralLightField extends CoreService {
    static descriptor() {
        return {
            id: "nelf.RebuildNeuralLightField",
            name: CAPTION,
            description: "Assembles the neural light field's scene from the project's assets.",
            dependencies: [Editor.Model.IModel, Editor.IContextActionRegistry],
        };
    }

    start() {
        const registry = this.pluginSystem.findInterface(Editor.IContextActionRegistry);
        // The editor removes an action when its guard is garbage collected.
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
        action.description = "Adds the missing objects of the light field's scene";
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

    // The project's asset of this name. If there is none, the asset is imported from the generated project
    // that contains the plugin.
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
                "The project has no asset " + asked.name + ". Copy Assets/" + asked.file +
                    " and its .meta from the generated project into this project's Assets.",
            );
        }
        if (asked === MODELS.student) {
            console.warn(
                "[NeuralLightField] Student was imported without its .meta: select it and set the " +
                    "scale of its output to 255 on all three channels. Otherwise the image stays black.",
            );
        }
        return imported.primary;
    }

    // Creates the material with Lens Studio's preset, because only the editor can write a shader.
    async imageMaterial() {
        const descriptor = this.pluginSystem.descriptors.find((each) => each.id === IMAGE_MATERIAL);
        if (!descriptor) {
            console.warn(
                "[NeuralLightField] This Lens Studio has no preset " + IMAGE_MATERIAL + ". The image " +
                    "will fill the screen. Add an Image component to " + LIGHT_FIELD + ".",
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

// The object that runs the controller script, or else the object named LIGHT_FIELD, or null.
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
