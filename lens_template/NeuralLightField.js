// Controller of a neural light field: touches move a camera, and three models render the camera's view.
//
// The models run one after the other, once per image:
//     Sampler    pose (c2w33, c2w13) -> points along every ray (pts)
//     Embedder   points (rays) -> their positional encoding (embbrays)
//     student    encoding (input) -> image (output)
// SnapML's buffers are channel-last, data[(row * width + column) * channels + channel]. In this layout
// each output has the order that the next input needs, so the script copies it unchanged.
//
// Poses are camera-to-world. The camera's x axis points right, its y axis points up, and the camera
// looks along -z. A position on an orbit is azimuth (about `up`, from `east` towards `north`) and
// elevation, both in degrees.

//@input Asset.MLAsset sampler
//@input Asset.MLAsset embedder
//@input Asset.MLAsset student
//@input Asset.Texture renderTarget
//@input Component.Text message

/**
 * @typedef {"sampler" | "embedder" | "student"} Role
 * @typedef {"CPU" | "GPU" | "Accelerator" | "Auto"} Mode
 * @typedef {{start: number, range: number[] | null, per_screen: number}} AxisNumbers
 *     range: [lowest, highest], or null for a full circle; per_screen: change for a drag across the
 *     whole screen
 * @typedef {{value: number, range: number[] | null, perScreen: number, drag: number, speed: number}} ViewAxis
 *     drag: distance dragged since the last frame, in screens; speed: in screens per second
 * @typedef {{name: string, rays: number[], image: number[], points: number, frequencies: number,
 *     near: number, far: number, drift: number, source: SourceFrame, horizontal: AxisNumbers,
 *     vertical: AxisNumbers}} Numbers
 *     rays, image: [height, width]
 * @typedef {{center: number[], unit: number, rotation: number[][]}} SourceFrame
 *     frame of your own poses: rotation * (position - center) / unit is a position in this scene
 * @typedef {{path: "orbit", center: number[], radius: number, east: number[], north: number[],
 *     up: number[]}} Orbit
 * @typedef {{path: "shift", pose: number[][]}} Shift
 * @typedef {{rotation: number[], position: number[]}} Pose
 */

// The numbers of this scene. The generator of the project writes this line.
/** @type {Numbers & (Orbit | Shift)} */
const SCENE = {};

const RADIANS = Math.PI / 180;
const GLIDE_SECONDS = 0.4; // time in which a released drag slows down to 1/e of its speed
const GRIP_SECONDS = 0.06; // time over which the speed of a drag is averaged
const REST_SCREENS_PER_SECOND = 0.01; // a slower glide ends
const LONGEST_FRAME_SECONDS = 0.1; // a longer frame (a stall) counts as this long
const DRIFT_AFTER_SECONDS = 3; // time from the last touch to the start of the drift

// Sampler and Embedder run on the CPU: sines of coordinates times 2^5 need float32, which other backends
// do not guarantee. The student tries faster backends first, and the next one when a backend refuses
// its activation.
/** @type {Mode[]} */
const RAY_MODES = ["CPU"];
/** @type {Mode[]} */
const STUDENT_MODES = ["Auto", "GPU", "CPU"];

/** @type {Partial<Record<Role, MLComponent>>} */
const models = {}; // the models that are loaded
const horizontal = axisOf(SCENE.horizontal); // azimuth, or the camera's shift to the right
const vertical = axisOf(SCENE.vertical); // elevation, or the camera's shift upwards
/** @type {{id: number, x: number, y: number} | null} */
let touch = null; // the finger that moves the camera
let restSeconds = 0;
let driftSign = 1;
let stale = true; // whether the image on screen is older than the current pose
let shown = false;
let stopped = false;

/** @param {AxisNumbers} numbers @returns {ViewAxis} */
function axisOf(numbers) {
    return {
        value: numbers.start,
        range: numbers.range,
        perScreen: numbers.per_screen,
        drag: 0,
        speed: 0,
    };
}

// ---- poses

/** @param {number} x @param {number} y @returns {Pose} */
function poseAt(x, y) {
    return SCENE.path === "orbit" ? orbitPose(SCENE, x, y) : shiftedPose(SCENE, x, y);
}

// The rotation is a row-major 3x3 matrix with the camera's right, up and back axes as columns.
/** @param {Orbit} orbit @param {number} azimuth @param {number} elevation @returns {Pose} */
function orbitPose(orbit, azimuth, elevation) {
    const a = azimuth * RADIANS;
    const e = elevation * RADIANS;
    const rotation = [];
    const position = [];
    for (let i = 0; i < 3; i++) {
        const outward = Math.cos(a) * orbit.east[i] + Math.sin(a) * orbit.north[i];
        const right = Math.cos(a) * orbit.north[i] - Math.sin(a) * orbit.east[i];
        const back = Math.cos(e) * outward + Math.sin(e) * orbit.up[i];
        rotation.push(right, Math.cos(e) * orbit.up[i] - Math.sin(e) * outward, back);
        position.push(orbit.center[i] + orbit.radius * back);
    }
    return { rotation: rotation, position: position };
}

// The mean pose, moved by x and y along its right and up axes.
/** @param {Shift} mean @param {number} x @param {number} y @returns {Pose} */
function shiftedPose(mean, x, y) {
    const rotation = [];
    const position = [];
    for (let i = 0; i < 3; i++) {
        const row = mean.pose[i];
        rotation.push(row[0], row[1], row[2]);
        position.push(row[3] + x * row[0] + y * row[1]);
    }
    return { rotation: rotation, position: position };
}

// ---- motion

// The latest finger moves the camera. A touch without an end event (the app was left) therefore does
// not block the next touch.
/** @param {TouchStartEvent} event */
function onTouchStart(event) {
    const position = event.getTouchPosition();
    touch = { id: event.getTouchId(), x: position.x, y: position.y };
    horizontal.speed = 0;
    vertical.speed = 0;
}

/** @param {TouchMoveEvent} event */
function onTouchMove(event) {
    if (touch === null || event.getTouchId() !== touch.id) {
        return;
    }
    const position = event.getTouchPosition();
    horizontal.drag += position.x - touch.x;
    vertical.drag += position.y - touch.y;
    touch.x = position.x;
    touch.y = position.y;
}

/** @param {TouchEndEvent} event */
function onTouchEnd(event) {
    if (touch !== null && event.getTouchId() === touch.id) {
        touch = null;
    }
}

/** @param {number} seconds */
function move(seconds) {
    const moving = [horizontal, vertical].map(function (axis) {
        return follow(axis, seconds);
    });
    restSeconds = touch !== null || moving[0] || moving[1] ? 0 : restSeconds + seconds;
    if (SCENE.drift > 0 && restSeconds > DRIFT_AFTER_SECONDS) {
        if (!shift(horizontal, driftSign * SCENE.drift * seconds)) {
            driftSign = -driftSign;
        }
    }
}

// Moves an axis with the finger, or lets it glide on after a release. Returns whether the axis moved.
/** @param {ViewAxis} axis @param {number} seconds */
function follow(axis, seconds) {
    const held = touch !== null || axis.drag !== 0;
    let screens = axis.drag;
    if (held) {
        const grip = 1 - Math.exp(-seconds / GRIP_SECONDS);
        axis.speed += (axis.drag / seconds - axis.speed) * grip;
        axis.drag = 0;
    } else {
        if (Math.abs(axis.speed) < REST_SCREENS_PER_SECOND) {
            axis.speed = 0;
        }
        screens = axis.speed * seconds;
        axis.speed *= Math.exp(-seconds / GLIDE_SECONDS);
    }
    if (screens !== 0 && !shift(axis, screens * axis.perScreen)) {
        axis.speed = 0;
    }
    return screens !== 0;
}

// Changes an axis within its range. Returns false when the range limited the change.
/** @param {ViewAxis} axis @param {number} change */
function shift(axis, change) {
    let value = axis.value + change;
    let free = true;
    if (axis.range === null) {
        value %= 360;
    } else {
        const inside = Math.min(Math.max(value, axis.range[0]), axis.range[1]);
        free = inside === value;
        value = inside;
    }
    stale = stale || value !== axis.value;
    axis.value = value;
    return free;
}

// ---- models

/** @returns {Record<Role, {inputs: Record<string, number>, outputs: Record<string, number>}>} */
function tensorSizes() {
    const rays = SCENE.rays[0] * SCENE.rays[1];
    const coordinates = SCENE.points * 3;
    const encoded = rays * coordinates * (2 * SCENE.frequencies + 1);
    return {
        sampler: { inputs: { c2w33: 9, c2w13: 3 }, outputs: { pts: rays * coordinates } },
        embedder: { inputs: { rays: rays * coordinates }, outputs: { embbrays: encoded } },
        student: {
            inputs: { input: encoded },
            outputs: { output: SCENE.image[0] * SCENE.image[1] * 3 },
        },
    };
}

/** @param {Role} role @param {Mode[]} modes */
function load(role, modes) {
    const mode = modes[0];
    let abandoned = false;
    /** @param {string} doing @param {string} error */
    const giveUp = function (doing, error) {
        if (abandoned || stopped) {
            return;
        }
        abandoned = true;
        delete models[role];
        const trouble = "The " + role + " model could not be " + doing + " (" + mode + "): " + error;
        if (modes.length === 1) {
            fail(trouble);
            return;
        }
        print("[NeuralLightField] " + trouble + "; trying " + modes[1]);
        component.enabled = false;
        load(role, modes.slice(1));
    };
    const component = script.getSceneObject().createComponent("MLComponent");
    component.model = script[role];
    component.inferenceMode = MachineLearning.InferenceMode[mode];
    component.onLoadingFailed = function (error) {
        giveUp("loaded", error);
    };
    component.onRunningFailed = function (error) {
        giveUp("run", error);
    };
    component.onLoadingFinished = guarded(function () {
        accept(role, component);
    });
    if (role === "student") {
        component.onRunningFinished = guarded(function () {
            show(component.getOutput("output").texture);
        });
    }
    component.build([]);
}

/** @param {Role} role @param {MLComponent} component */
function accept(role, component) {
    const sizes = tensorSizes()[role];
    for (const name in sizes.inputs) {
        checkSize(role, name, component.getInput(name).shape, sizes.inputs[name]);
    }
    for (const name in sizes.outputs) {
        const output = component.getOutput(name);
        checkSize(role, name, output.shape, sizes.outputs[name]);
        output.mode =
            role === "student"
                ? MachineLearning.OutputMode.Texture
                : MachineLearning.OutputMode.Data;
    }
    models[role] = component;
    stale = true;
}

/** @param {Role} role @param {string} name @param {vec3} shape @param {number} expected */
function checkSize(role, name, shape, expected) {
    const found = shape.x * shape.y * shape.z;
    if (found !== expected) {
        const counts = found + " numbers, not " + expected + "; generate the project again";
        throw new Error("the " + role + " model's " + name + " holds " + counts);
    }
}

/** @param {MLComponent} sampler @param {MLComponent} embedder @param {MLComponent} student */
function render(sampler, embedder, student) {
    const pose = poseAt(horizontal.value, vertical.value);
    sampler.getInput("c2w33").data.set(pose.rotation);
    sampler.getInput("c2w13").data.set(pose.position);
    sampler.runImmediate(true);
    if (stopped) {
        return; // onRunningFailed has shown the reason
    }
    embedder.getInput("rays").data.set(sampler.getOutput("pts").data);
    embedder.runImmediate(true);
    if (stopped) {
        return;
    }
    student.getInput("input").data.set(embedder.getOutput("embbrays").data);
    const late = MachineLearning.FrameTiming.LateUpdate;
    stale = false;
    student.runScheduled(false, late, late);
}

// Shows the student's output texture, after the first run, because the texture is not valid before. If
// this object has an Image with a material, the Image shows the texture in its own proportions.
// Otherwise the texture becomes the background of the render target and fills the screen.
/** @param {Texture} texture */
function show(texture) {
    if (shown) {
        return;
    }
    const image = script.getSceneObject().getComponent("Component.Image");
    if (image && image.getMaterialsCount() > 0) {
        image.mainPass.baseTex = texture;
    } else {
        const control = /** @type {RenderTargetProvider} */ (script.renderTarget.control);
        control.inputTexture = texture;
        control.clearColorOption = ClearColorOption.CustomTexture;
    }
    shown = true;
    say("");
}

// ---- start, messages and errors

/** @param {string} text */
function say(text) {
    if (script.message) {
        script.message.text = text;
    }
}

/** @param {string} text */
function fail(text) {
    stopped = true;
    print("[NeuralLightField] " + text);
    say(text);
}

/**
 * @template {any[]} A
 * @param {(...event: A) => void} action
 * @returns {(...event: A) => void} the action; its errors are shown on screen, not only logged
 */
function guarded(action) {
    return function (...event) {
        if (stopped) {
            return;
        }
        try {
            action(...event);
        } catch (error) {
            const reason = /** @type {any} */ (error);
            fail("The light field script stopped: " + (reason.message || reason));
        }
    };
}

/** @param {UpdateEvent} event */
function onUpdate(event) {
    const seconds = Math.min(event.getDeltaTime(), LONGEST_FRAME_SECONDS);
    if (seconds > 0) {
        move(seconds);
    }
    const { sampler, embedder, student } = models;
    const ready = sampler && embedder && student;
    if (ready && stale && student.state !== MachineLearning.ModelState.Running) {
        render(sampler, embedder, student);
    }
}

function start() {
    const missing = ["sampler", "embedder", "student", "renderTarget"].filter(function (name) {
        return !script[name];
    });
    if (missing.length > 0) {
        fail("Set these inputs of the NeuralLightField script: " + missing.join(", "));
        return;
    }
    say("Loading " + SCENE.name);
    global.touchSystem.touchBlocking = true;
    script.createEvent("TouchStartEvent").bind(guarded(onTouchStart));
    script.createEvent("TouchMoveEvent").bind(guarded(onTouchMove));
    script.createEvent("TouchEndEvent").bind(guarded(onTouchEnd));
    script.createEvent("UpdateEvent").bind(guarded(onUpdate));
    load("sampler", RAY_MODES);
    load("embedder", RAY_MODES);
    load("student", STUDENT_MODES);
}

script.createEvent("OnStartEvent").bind(guarded(start));
