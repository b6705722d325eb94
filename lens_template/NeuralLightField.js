// Shows a neural light field: touches move a camera, the camera's pose becomes a picture.
//
// Three models run in a chain, once per picture:
//     Sampler    pose (c2w33, c2w13) -> points along every ray (pts)
//     Embedder   points (rays) -> their positional encoding (embbrays)
//     student    encoding (input) -> picture (output)
// SnapML's buffers are channel-last, data[(row * width + column) * channels + channel]. Laid out so,
// each output has the very order that the next input wants, and is copied unchanged.
//
// Frame: poses are camera-to-world; the camera's x axis points right, y up, and it looks along -z.
// An orbit is given by azimuth (about `up`, from `east` towards `north`) and elevation, in degrees.

//@input Asset.MLAsset sampler
//@input Asset.MLAsset embedder
//@input Asset.MLAsset student
//@input Asset.Texture renderTarget
//@input Component.Text message

const SCENE = {}; // replaced by this scene's numbers when the project is generated

const RADIANS = Math.PI / 180;
const GLIDE_SECONDS = 0.4; // a released drag slows down by 1/e in this time
const GRIP_SECONDS = 0.06; // the speed of a drag is averaged over this time
const REST_SCREENS_PER_SECOND = 0.01; // a glide slower than this has ended
const LONGEST_FRAME_SECONDS = 0.1; // a frame longer than this (a stall) counts as this long
const DRIFT_AFTER_SECONDS = 3; // automatic motion waits this long after the last touch

// Sines of coordinates times 2^5 need float32, which only the CPU promises. The student tries
// faster backends first, and falls back when its activation is refused there.
const RAY_MODES = ["CPU"];
const STUDENT_MODES = ["Auto", "GPU", "CPU"];

const models = {}; // loaded MLComponents by role
const horizontal = axisOf(SCENE.horizontal); // azimuth, or the camera's shift to the right
const vertical = axisOf(SCENE.vertical); // elevation, or the camera's shift upwards
let touch = null; // {id, x, y} of the finger that moves the camera
let restSeconds = 0;
let driftSign = 1;
let stale = true; // the picture on screen is not the one for the present pose
let shown = false;
let stopped = false;

function axisOf(settings) {
    return {
        value: settings.start,
        range: settings.range, // [lowest, highest], or null where it wraps around
        perScreen: settings.per_screen, // change for a drag across the whole screen
        drag: 0, // dragged since the last frame, in screens
        speed: 0, // screens per second
    };
}

// ---- poses

function poseAt(x, y) {
    return SCENE.path === "orbit" ? orbitPose(x, y) : shiftedPose(x, y);
}

// rotation: row-major 3x3 with the camera's right, up and back axes as columns
function orbitPose(azimuth, elevation) {
    const a = azimuth * RADIANS;
    const e = elevation * RADIANS;
    const rotation = [];
    const position = [];
    for (let i = 0; i < 3; i++) {
        const outward = Math.cos(a) * SCENE.east[i] + Math.sin(a) * SCENE.north[i];
        const right = Math.cos(a) * SCENE.north[i] - Math.sin(a) * SCENE.east[i];
        const back = Math.cos(e) * outward + Math.sin(e) * SCENE.up[i];
        rotation.push(right, Math.cos(e) * SCENE.up[i] - Math.sin(e) * outward, back);
        position.push(SCENE.centre[i] + SCENE.radius * back);
    }
    return { rotation: rotation, position: position };
}

// the mean pose moved within its own picture plane
function shiftedPose(x, y) {
    const rotation = [];
    const position = [];
    for (let i = 0; i < 3; i++) {
        const row = SCENE.pose[i];
        rotation.push(row[0], row[1], row[2]);
        position.push(row[3] + x * row[0] + y * row[1]);
    }
    return { rotation: rotation, position: position };
}

// ---- motion

// the latest finger leads: an end that never came (the app was left) cannot block the next touch
function onTouchStart(event) {
    const position = event.getTouchPosition();
    touch = { id: event.getTouchId(), x: position.x, y: position.y };
    horizontal.speed = 0;
    vertical.speed = 0;
}

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

function onTouchEnd(event) {
    if (touch !== null && event.getTouchId() === touch.id) {
        touch = null;
    }
}

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

// follows the finger, or glides on; true while there is motion
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

// moves an axis within its range; false when it met the end
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

// ---- the chain of models

function tensorSizes() {
    const rays = SCENE.rays[0] * SCENE.rays[1];
    const coordinates = SCENE.points * 3;
    const encoded = rays * coordinates * (2 * SCENE.frequencies + 1);
    return {
        sampler: { inputs: { c2w33: 9, c2w13: 3 }, outputs: { pts: rays * coordinates } },
        embedder: { inputs: { rays: rays * coordinates }, outputs: { embbrays: encoded } },
        student: {
            inputs: { input: encoded },
            outputs: { output: SCENE.picture[0] * SCENE.picture[1] * 3 },
        },
    };
}

function load(role, modes) {
    const mode = modes[0];
    let abandoned = false;
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
        component.onRunningFinished = guarded(show);
    }
    component.build([]);
}

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

function checkSize(role, name, shape, expected) {
    const found = shape.x * shape.y * shape.z;
    if (found !== expected) {
        const counts = found + " numbers, not " + expected + "; generate the project again";
        throw new Error("the " + role + " model's " + name + " holds " + counts);
    }
}

function render() {
    const pose = poseAt(horizontal.value, vertical.value);
    models.sampler.getInput("c2w33").data.set(pose.rotation);
    models.sampler.getInput("c2w13").data.set(pose.position);
    models.sampler.runImmediate(true);
    if (stopped) {
        return; // its onRunningFailed has spoken
    }
    models.embedder.getInput("rays").data.set(models.sampler.getOutput("pts").data);
    models.embedder.runImmediate(true);
    if (stopped) {
        return;
    }
    models.student.getInput("input").data.set(models.embedder.getOutput("embbrays").data);
    const late = MachineLearning.FrameTiming.LateUpdate;
    stale = false;
    models.student.runScheduled(false, late, late);
}

// The output texture is not reliable before the first run, so it is put on screen after it: on this
// object's Image where there is one with a material, which keeps the picture's proportions, else
// behind everything on the render target, which stretches it over the screen.
function show() {
    if (shown) {
        return;
    }
    const texture = models.student.getOutput("output").texture;
    const image = script.getSceneObject().getComponent("Component.Image");
    if (image && image.getMaterialsCount() > 0) {
        image.mainPass.baseTex = texture;
    } else {
        script.renderTarget.control.inputTexture = texture;
        script.renderTarget.control.clearColorOption = ClearColorOption.CustomTexture;
    }
    shown = true;
    say("");
}

// ---- life

function say(text) {
    if (script.message) {
        script.message.text = text;
    }
}

function fail(text) {
    stopped = true;
    print("[NeuralLightField] " + text);
    say(text);
}

function guarded(action) {
    return function (event) {
        if (stopped) {
            return;
        }
        try {
            action(event);
        } catch (error) {
            fail("The light field stopped: " + (error.message || error));
        }
    };
}

function onUpdate(event) {
    const seconds = Math.min(event.getDeltaTime(), LONGEST_FRAME_SECONDS);
    if (seconds > 0) {
        move(seconds);
    }
    const ready = models.sampler && models.embedder && models.student;
    if (ready && stale && models.student.state !== MachineLearning.ModelState.Running) {
        render();
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
