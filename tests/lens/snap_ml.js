// A mock of SnapML on ONNX Runtime: channel-last tensors, with the scales and biases of the .meta.
//
// A tensor [1, z, y, x] of the graph is data[(row * x + column) * z + channel] in the script. SnapML maps
// each input and output value to value * scale + bias, with the numbers of its channel.
//
// SnapML's runImmediate is synchronous, ONNX Runtime's JavaScript API is not. Therefore ONNX Runtime runs
// in a worker thread, and the script's thread waits for the result.

"use strict";
const { Worker, MessageChannel, isMainThread, receiveMessageOnPort, workerData } =
    require("worker_threads");

if (isMainThread) {
    module.exports = { SnapML };
} else {
    serve(workerData);
}

// descriptions: by role {file, inputs, outputs}, each tensor {name, size: [x, y, z], channels: [[scale, bias]]}
function SnapML(descriptions) {
    const { port1, port2 } = new MessageChannel();
    const answered = new Int32Array(new SharedArrayBuffer(4));
    const files = Object.fromEntries(
        Object.entries(descriptions).map(([role, model]) => [role, model.file]),
    );
    const worker = new Worker(__filename, {
        workerData: { port: port2, answered, files },
        transferList: [port2],
    });
    worker.unref();

    function ask(role, feeds) {
        Atomics.store(answered, 0, 0);
        worker.postMessage({ role, feeds });
        Atomics.wait(answered, 0, 0);
        const { results, error } = receiveMessageOnPort(port1).message;
        if (error) throw new Error(role + ": " + error);
        return results;
    }

    this.sizes = function (role) {
        const sizesOf = (tensors) => Object.fromEntries(tensors.map((t) => [t.name, t.size]));
        return [sizesOf(descriptions[role].inputs), sizesOf(descriptions[role].outputs)];
    };
    // buffers: the script's inputs by name, channel-last; returns the outputs in the same way
    this.run = function (role, buffers) {
        const { inputs, outputs } = descriptions[role];
        const feeds = Object.fromEntries(
            inputs.map((t) => {
                const [x, y, z] = t.size;
                const data = channelsFirst(normalized(buffers[t.name], t.channels), t.size);
                return [t.name, { data, dims: [1, z, y, x] }];
            }),
        );
        const results = ask(role, feeds);
        return Object.fromEntries(
            outputs.map((t) => {
                const { data, dims } = results[t.name];
                const [x, y, z] = t.size;
                if (String(dims) !== String([1, z, y, x])) {
                    throw new Error(t.name + " is " + dims + ", its .meta has " + t.size);
                }
                return [t.name, normalized(channelsLast(data, t.size), t.channels)];
            }),
        );
    };
}

function normalized(data, channels) {
    return data.map((value, i) => {
        const [scale, bias] = channels[i % channels.length];
        return value * scale + bias;
    });
}

function channelsFirst(data, [x, y, z]) {
    const result = new Float32Array(data.length);
    for (let pixel = 0; pixel < x * y; pixel++) {
        for (let c = 0; c < z; c++) result[c * x * y + pixel] = data[pixel * z + c];
    }
    return result;
}

function channelsLast(data, [x, y, z]) {
    const result = new Float32Array(data.length);
    for (let pixel = 0; pixel < x * y; pixel++) {
        for (let c = 0; c < z; c++) result[pixel * z + c] = data[c * x * y + pixel];
    }
    return result;
}

function serve({ port, answered, files }) {
    const ort = require("onnxruntime-node");
    const { parentPort } = require("worker_threads");
    const sessions = {};

    async function compute(role, feeds) {
        sessions[role] ??= await ort.InferenceSession.create(files[role], { intraOpNumThreads: 1 });
        const tensors = Object.entries(feeds).map(([name, { data, dims }]) => [
            name,
            new ort.Tensor("float32", data, dims),
        ]);
        const outputs = await sessions[role].run(Object.fromEntries(tensors));
        const plain = Object.entries(outputs).map(([name, { data, dims }]) => [name, { data, dims }]);
        return Object.fromEntries(plain);
    }

    parentPort.on("message", async ({ role, feeds }) => {
        let answer;
        try {
            answer = { results: await compute(role, feeds) };
        } catch (error) {
            answer = { error: String(error.message || error) };
        }
        port.postMessage(answer);
        Atomics.store(answered, 0, 1);
        Atomics.notify(answered, 0);
    });
}
