import { env } from "@huggingface/transformers";

env.allowLocalModels = true; // in a browser, the hub alone is the default
env.allowRemoteModels = false;
env.backends.onnx.wasm.wasmPaths = "/node_modules/onnxruntime-web/dist/"; // else jsdelivr.net
