"""Compute a saved Core ML program as coremltools defines its operators in NumPy; Core ML itself runs on macOS alone."""

import json
import sys
from types import SimpleNamespace

import coremltools
import numpy as np
from coremltools.converters.mil.frontend.milproto.load import load
from tokenizers import Tokenizer

tokenizer_file, package, tokens, pad_id, *texts = sys.argv[1:]
model = coremltools.models.MLModel(package, skip_model_load=True)
spec = model.get_spec()
tokenizer = Tokenizer.from_file(tokenizer_file)
tokenizer.enable_truncation(int(tokens))
tokenizer.enable_padding(length=int(tokens), pad_id=int(pad_id))

rows = []
for text in texts:
    encoding = tokenizer.encode(text)
    function = load(spec, spec.specificationVersion, model.weights_dir).functions["main"]
    feed = {"input_ids": encoding.ids, "attention_mask": encoding.attention_mask}
    for name, variable in function.inputs.items():
        variable._sym_val = SimpleNamespace(val=np.array([feed[name]], np.int32))
    for operation in function.operations:
        if operation.op_type == "const" and isinstance(operation.outputs[0].val, np.bool_):
            operation.outputs[0]._sym_val = SimpleNamespace(val=bool(operation.outputs[0].val))  # NumPy wants Python's
        elif operation.op_type != "const":
            values = operation.value_inference()  # what coremltools folds constants with
            assert values is not None, f"coremltools has no NumPy form of {operation.op_type}"
            several = values if len(operation.outputs) > 1 else [values]
            for output, value in zip(operation.outputs, several, strict=True):
                output._sym_val = SimpleNamespace(val=getattr(value, "val", value))
    (embedding,) = (one.val for one in function.outputs if one.name == "sentence_embedding")
    rows.append(embedding[0])
np.save("embeddings.npy", np.stack(rows) / np.linalg.norm(rows, axis=1, keepdims=True))


def described(features):
    arrays = {one.name: one.type.multiArrayType for one in features}
    return {
        name: [
            list(array.shape),
            coremltools.proto.FeatureTypes_pb2.ArrayFeatureType.ArrayDataType.Name(array.dataType),
        ]
        for name, array in arrays.items()
    }


with open("answer.json", "w") as file:
    json.dump({"inputs": described(spec.description.input), "outputs": described(spec.description.output)}, file)
