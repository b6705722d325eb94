// A mock of Lens Studio's editor: loads the plugin, right-clicks, and reports the resulting project.
//
// Reads JSON {plugin, assets, imports, presets, empty, contexts, clicks} from standard input:
//     plugin     the plugin's file
//     assets     the project's assets as [name, type]
//     imports    the names of files that can be imported
//     presets    whether the editor has its image preset
//     empty      whether the scene lacks a camera and a render target
//     contexts   the types of object that are right-clicked
//     clicks     how often the action is chosen after each right click
// The mock's objects accept only properties that the editor's objects have.

"use strict";
const fs = require("fs");
const path = require("path");
const vm = require("vm");

const order = JSON.parse(fs.readFileSync(0, "utf8"));
const log = [];
let serial = 0;

class Entity {
    constructor(type) {
        this.type = type;
        this.id = "entity " + serial++;
    }
    isOfType(type) {
        return type === this.type;
    }
}

class Asset extends Entity {
    constructor(name, type) {
        super(type);
        this.name = name;
    }
}

class Component extends Entity {
    static properties = {
        Camera: { fov: 45, renderTarget: null },
        Image: { materials: [], stretchMode: null },
        Text: { text: "Text", size: 48 },
    };
    constructor(type) {
        super(type);
        if (!(type in Component.properties)) throw new Error("no component " + type);
        Object.assign(this, Component.properties[type]);
        Object.seal(this);
    }
}

// The component has the inputs of its script as properties once the script is assigned.
class ScriptComponent extends Entity {
    constructor() {
        super("ScriptComponent");
        this.asset = null;
    }
    get scriptAsset() {
        return this.asset;
    }
    set scriptAsset(asset) {
        if (asset.type !== "JavaScriptAsset") throw new Error(asset.type + " is no script");
        if (this.asset === asset) return;
        this.asset = asset;
        for (const input of order.inputs) this[input] = null;
        Object.seal(this);
    }
}

class SceneObject extends Entity {
    constructor(name) {
        super("SceneObject");
        this.name = name;
        this.components = [];
        this.localTransform = new Transform(new vec3(0, 0, 0), new vec3(0, 0, 0), new vec3(1, 1, 1));
        Object.seal(this);
    }
    addComponent(type) {
        const made = type === "ScriptComponent" ? new ScriptComponent() : new Component(type);
        this.components.push(made);
        return made;
    }
    getComponent(type) {
        return this.components.find((component) => component.type === type) || null;
    }
}

class Scene extends Asset {
    constructor() {
        super("Scene", "Scene");
        this.sceneObjects = [];
        this.captureTarget = null;
        this.liveTarget = null;
        Object.seal(this);
    }
    get mainCamera() {
        const cameras = this.sceneObjects.map((object) => object.getComponent("Camera"));
        return cameras.find((camera) => camera !== null) || null;
    }
    createSceneObject(name) {
        if (!changing) throw new Error("changed outside an undo group");
        const made = new SceneObject(name);
        this.sceneObjects.push(made);
        return made;
    }
}

class vec3 {
    constructor(x, y, z) {
        Object.assign(this, { x, y, z });
    }
}

class Transform {
    constructor(position, rotation, scale) {
        Object.assign(this, { position, rotation, scale });
    }
}

class Path {
    constructor(text) {
        this.text = text;
    }
    toString() {
        return this.text;
    }
}

class ContextAction {
    constructor() {
        Object.assign(this, { id: "", caption: "", description: "", group: [], apply: () => {} });
        Object.seal(this);
    }
}

const scene = new Scene();
const assets = order.assets.map(([name, type]) => new Asset(name, type));
let changing = false;
const assetManager = {
    assets,
    createNativeAsset(type, name) {
        const made = new Asset(name, type);
        assets.push(made);
        return made;
    },
    async importExternalFileAsync(source) {
        const name = path.basename(source.toString());
        if (!order.imports.includes(name)) throw new Error("no such file");
        const type = name.endsWith(".js") ? "JavaScriptAsset" : "MLAsset";
        log.push("import " + path.relative(path.dirname(order.plugin), source.toString()));
        const primary = new Asset(path.parse(name).name, type);
        assets.push(primary);
        return { primary };
    },
};
const history = {
    executeAsGroup(name, change) {
        log.push("undo group " + name);
        changing = true;
        change();
        changing = false;
    },
};

const IMAGE_PRESET = { id: "Com.Snap.MaterialPreset.ImageMaterialPreset", name: "Image" };
const actions = [];
const interfaces = {
    IModel: { project: { assetManager, history, scene } },
    IContextActionRegistry: {
        registerAction(action) {
            actions.push(action);
            return { dispose() {} };
        },
    },
};
const pluginSystem = {
    descriptors: [{ id: "Com.Snap.ImageComponentPreset", name: "Image" }].concat(
        order.presets ? [IMAGE_PRESET] : [],
    ),
    create(descriptor) {
        if (descriptor !== IMAGE_PRESET) throw new Error("created " + descriptor.id);
        return { createAsync: async () => assetManager.createNativeAsset("Material", "Image") };
    },
    findInterface: (id) => interfaces[id],
};
const Editor = {
    isNull: (object) => object === null || object === undefined,
    Path,
    Transform,
    ContextAction,
    IContextActionRegistry: "IContextActionRegistry",
    Model: { IModel: "IModel" },
    Components: { StretchMode: { Fit: "Fit" } },
};
class CoreService {
    constructor(system) {
        this.pluginSystem = system;
    }
}

function logged(kind) {
    return (message) => log.push(kind + ": " + message);
}

async function load() {
    const console = { log: logged("log"), warn: logged("warn"), error: logged("error") };
    const context = vm.createContext({ Editor, vec3, console });
    const module = new vm.SourceTextModule(fs.readFileSync(order.plugin, "utf8"), {
        context,
        initializeImportMeta(meta) {
            meta.resolve = (name) => path.resolve(path.dirname(order.plugin), name);
        },
    });
    await module.link((name) => {
        if (name !== "LensStudio:CoreService") throw new Error("no module " + name);
        return new vm.SyntheticModule(
            ["CoreService"],
            function () {
                this.setExport("CoreService", CoreService);
            },
            { context },
        );
    });
    await module.evaluate();
    return Object.values(module.namespace);
}

function written(value) {
    if (value instanceof Entity) return value.type + " " + (value.name || "");
    return Array.isArray(value) ? value.map(written) : value;
}

function described(object) {
    const components = object.components.map((component) => {
        const { id, type, asset, ...rest } = component;
        const properties = Object.entries(rest).map(([name, value]) => [name, written(value)]);
        const script = asset ? { scriptAsset: written(asset) } : {};
        return [type, { ...script, ...Object.fromEntries(properties) }];
    });
    return { name: object.name, transform: object.localTransform, components };
}

async function main() {
    const [Plugin, ...others] = await load();
    if (others.length) throw new Error("more than one plugin in the file");
    if (!order.empty) {
        scene.captureTarget = assetManager.createNativeAsset("RenderTarget", "Render Target");
        changing = true;
        scene.createSceneObject("Camera").addComponent("Camera");
        changing = false;
    }
    const plugin = new Plugin(pluginSystem, Plugin.descriptor());
    plugin.start();
    const captions = [];
    for (const type of order.contexts) {
        const context = { isOfType: (name) => name === type };
        const offered = actions.map((action) => action(context)).filter((action) => action.caption);
        captions.push(offered.map((action) => action.caption));
        for (let i = 0; i < order.clicks; i++) {
            for (const action of offered) {
                action.apply();
                await new Promise((resolve) => setTimeout(resolve, 10));
            }
        }
    }
    plugin.stop();
    const descriptor = Plugin.descriptor();
    const target = written(scene.captureTarget);
    const objects = scene.sceneObjects.map(described);
    process.stdout.write(
        JSON.stringify({ descriptor, captions, objects, target, live: written(scene.liveTarget), log }),
    );
}

main();
