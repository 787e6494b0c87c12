"""Weights of ONNX graphs stored in float16, and computed with in float32."""

import numpy as np
import onnx
from onnx import numpy_helper

MIN_SIZE = 256  # values of the smallest tensor that is worth a node
MAX_CHANGE = 2**-25  # half of the smallest step of float16


def store_in_float16(graph: onnx.ModelProto) -> None:
    """Stores weights in float16, where this changes none by more than `MAX_CHANGE`. The others stay in float32.

    So weights that were saved in float16 or bfloat16 take half the bytes, and ids stay the model's. A cast to float32
    follows each. Runtimes compute it once, when they load the graph.
    """
    casts = []
    for weight in graph.graph.initializer:
        if weight.data_type != onnx.TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(weight)
        if values.size < MIN_SIZE or not fits_float16(values):
            continue
        # The nodes of the graph read a weight by its name. The weight "w" is stored as "w_float16", and a cast of it
        # gets the name "w". So the nodes read the result of the cast in place of the weight.
        name = weight.name
        stored_name = f"{name}_float16"
        stored_weight = numpy_helper.from_array(values.astype(np.float16), stored_name)
        weight.CopyFrom(stored_weight)  # replaces the weight and its name in the graph
        cast = onnx.helper.make_node("Cast", inputs=[stored_name], outputs=[name], to=onnx.TensorProto.FLOAT)
        casts.append(cast)
    nodes = casts + list(graph.graph.node)  # the casts first, because the other nodes read their results
    graph.graph.ClearField("node")
    graph.graph.node.extend(nodes)


def fits_float16(values: np.ndarray) -> bool:
    """Whether float16 holds float32 values to `MAX_CHANGE`."""
    overflows = np.abs(values).max() > np.finfo(np.float16).max
    if overflows:
        return False
    rounded = values.astype(np.float16).astype(np.float32)
    largest_change = np.abs(rounded - values).max()
    return bool(largest_change <= MAX_CHANGE)
