// A mock of Lens Studio's runtime: runs the controller script and logs its calls.
//
// Reads JSON {script, scene, models, image, missing, steps, project, images} from standard input and
// writes the log as JSON. `models` lists per role the inference modes that fail to load or to run, and
// sizes that differ from the scene's. Steps are ["load"], ["update", seconds] and ["down" | "drag" |
// "up", x, y, id]. Tensors are channel-last float32.
//
// With `project` (see snap_ml.js) the three models are those of the project, and the mock appends every
// image of the student to the file `images` as bytes, row by row. Without `project` the models are
// simple functions of their inputs, so that a wrong order of calls or copies gives a wrong result.

"use strict";
const fs = require("fs");
const vm = require("vm");

const order = JSON.parse(fs.readFileSync(0, "utf8"));
const LONGEST_LOGGED = 1000; // longer tensors are not logged
const log = [];
const handlers = {};
const loading = [];
let late = [];

const MachineLearning = {
    FrameTiming: { Update: 0, LateUpdate: 1, OnRender: 2, None: 3 },
    InferenceMode: { CPU: 0, GPU: 1, Accelerator: 2, Auto: 3 },
    ModelState: { Running: 0, Loading: 1, Idle: 2, NotReady: 3 },
    OutputMode: { Texture: 0, Data: 1 },
};
const ClearColorOption = { None: 0, Background: 1, CustomColor: 2, CustomTexture: 3 };

function nameOf(table, value) {
    return Object.keys(table).find((key) => table[key] === value);
}

const simple = {
    sizes(role) {
        const [h, w] = order.scene.rays;
        const d = 3 * order.scene.points;
        const k = 2 * order.scene.frequencies + 1;
        const [height, width] = order.scene.image;
        return {
            sampler: [{ c2w33: [3, 3, 1], c2w13: [3, 1, 1] }, { pts: [d, h * w, 1] }],
            embedder: [{ rays: [d, h * w, 1] }, { embbrays: [d, h * w, k] }],
            student: [{ input: [w, h, d * k] }, { output: [width, height, 3] }],
        }[role];
    },
    run(role, input) {
        const values = (name, value) => {
            const [x, y, z] = this.sizes(role)[1][name];
            return { [name]: Float32Array.from({ length: x * y * z }, (_, i) => value(i)) };
        };
        if (role === "sampler") {
            const pose = [...input.c2w33, ...input.c2w13];
            return values("pts", (i) => pose[i % 12] + i / 64);
        }
        if (role === "embedder") {
            const rays = input.rays;
            return values("embbrays", (i) => rays[i % rays.length] * 2 + i / 128);
        }
        return {};
    },
};
const network = order.project ? new (require("./snap_ml.js").SnapML)(order.project) : simple;

function sizesOf(role) {
    const changes = (order.models[role] || {}).sizes || {};
    const changed = (part) => Object.entries(changes).filter(([name]) => name in part);
    return network.sizes(role).map((part) => ({ ...part, ...Object.fromEntries(changed(part)) }));
}

class Placeholder {
    constructor(name, [x, y, z]) {
        this.name = name;
        this.shape = { x, y, z };
        this.buffer = new Float32Array(x * y * z);
        this.mode = MachineLearning.OutputMode.Texture;
        this.texture = "texture of " + name;
    }
    get data() {
        return this.buffer; // no setter: an assignment throws in strict mode
    }
}

class OutputPlaceholder extends Placeholder {
    get data() {
        if (this.mode !== MachineLearning.OutputMode.Data) {
            throw new Error(this.name + " gives a texture, not data");
        }
        return this.buffer;
    }
}

class MLComponent {
    build(placeholders) {
        this.role = this.model;
        this.modeName = nameOf(MachineLearning.InferenceMode, this.inferenceMode);
        if (!this.onLoadingFinished || !this.onLoadingFailed || !this.onRunningFailed) {
            throw new Error("build before its callbacks are set");
        }
        log.push({ build: this.role, mode: this.modeName, placeholders: placeholders.length });
        this.state = MachineLearning.ModelState.Loading;
        loading.push(this);
    }
    finishLoading() {
        if (this.fails("load")) {
            this.onLoadingFailed("unsupported operator");
            return;
        }
        const [inputs, outputs] = sizesOf(this.role);
        const made = (kind) => ([name, size]) => [name, new kind(name, size)];
        this.inputs = Object.fromEntries(Object.entries(inputs).map(made(Placeholder)));
        this.outputs = Object.fromEntries(Object.entries(outputs).map(made(OutputPlaceholder)));
        this.state = MachineLearning.ModelState.Idle;
        this.onLoadingFinished();
    }
    fails(stage) {
        return (((order.models[this.role] || {})[stage]) || []).includes(this.modeName);
    }
    getInput(name) {
        if (!this.inputs[name]) throw new Error("no input " + name);
        return this.inputs[name];
    }
    getOutput(name) {
        if (!this.outputs[name]) throw new Error("no output " + name);
        return this.outputs[name];
    }
    compute() {
        if (this.fails("run")) {
            this.onRunningFailed("out of memory");
            return;
        }
        const buffers = Object.entries(this.inputs).map(([name, tensor]) => [name, tensor.buffer]);
        const short = buffers.filter(([, buffer]) => buffer.length <= LONGEST_LOGGED);
        const plain = short.map(([name, buffer]) => [name, Array.from(buffer)]);
        log.push({ run: this.role, ...Object.fromEntries(plain) });
        const results = network.run(this.role, Object.fromEntries(buffers));
        for (const [name, values] of Object.entries(results)) {
            this.outputs[name].buffer.set(values);
        }
        if (this.role === "student" && order.images) {
            // textures have bytes
            fs.appendFileSync(order.images, Uint8ClampedArray.from(this.outputs.output.buffer));
        }
        if (this.onRunningFinished) this.onRunningFinished();
    }
    runImmediate(sync) {
        if (sync !== true) throw new Error("the ray models must run at once");
        this.compute();
    }
    runScheduled(recurring, start, end) {
        const timing = [start, end].map((value) => nameOf(MachineLearning.FrameTiming, value));
        log.push({ schedule: this.role, recurring, timing });
        this.state = MachineLearning.ModelState.Running;
        late.push(this);
    }
}

const image = order.image && {
    mainPass: {
        set baseTex(texture) {
            log.push({ image: texture });
        },
    },
    getMaterialsCount: () => (order.image === "bare" ? 0 : 1),
};
const control = {
    set inputTexture(texture) {
        log.push({ target: texture });
    },
    set clearColorOption(option) {
        log.push({ clear: nameOf(ClearColorOption, option) });
    },
};
const message = {
    set text(text) {
        log.push({ say: text });
    },
};
const sceneObject = {
    createComponent(type) {
        if (type !== "MLComponent") throw new Error("unexpected " + type);
        return new MLComponent();
    },
    getComponent: (type) => (type === "Component.Image" && image) || null,
};
const script = {
    sampler: "sampler",
    embedder: "embedder",
    student: "student",
    renderTarget: { control },
    message: message,
    getSceneObject: () => sceneObject,
    createEvent: (type) => ({ bind: (handler) => (handlers[type] = handler) }),
};
for (const name of order.missing || []) {
    script[name] = null;
}

const world = {
    script,
    MachineLearning,
    ClearColorOption,
    global: { touchSystem: { touchBlocking: false } },
    print: (text) => log.push({ print: text }),
};
vm.createContext(world);
vm.runInContext('"use strict";\n' + order.script, world, { filename: "NeuralLightField.js" });

function fire(type, event) {
    if (handlers[type]) handlers[type](event);
}

function step([kind, ...rest]) {
    if (kind === "load") {
        while (loading.length) loading.shift().finishLoading();
    } else if (kind === "update") {
        fire("UpdateEvent", { getDeltaTime: () => rest[0] });
        const due = late;
        late = [];
        for (const component of due) {
            component.state = MachineLearning.ModelState.Idle;
            component.compute();
        }
    } else {
        const [x, y, id] = rest;
        const type = { down: "TouchStartEvent", drag: "TouchMoveEvent", up: "TouchEndEvent" }[kind];
        fire(type, { getTouchPosition: () => ({ x, y }), getTouchId: () => id || 0 });
    }
}

fire("OnStartEvent", {});
order.steps.forEach(step);
const poses = vm.runInContext(
    "(" + JSON.stringify(order.poses || []) + ").map((p) => poseAt(p[0], p[1]))",
    world,
);
const touchBlocking = world.global.touchSystem.touchBlocking;
process.stdout.write(JSON.stringify({ log, poses, touchBlocking }));
