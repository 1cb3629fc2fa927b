"""The unmasking step as a graph: exported here, run on a Jetson.

    settings.py        the settings of an export
    step_graph.py      the step in operators that TensorRT has
    int8.py            its weight products in INT8
    graphs.py          step and encoder as ONNX graphs
    report.py          a graph beside the torch model, on rows with hidden tokens
    bundle.py          the folder to copy to the device
    engine_builder.py  TensorRT engines, built where they run; NVIDIA's compiler as a check
    engine_runtime.py  ONNX Runtime and TensorRT sessions

For export_jetson.py, generate.py and measuring/device.py. settings.py, engine_builder.py and
engine_runtime.py go into the bundle: Python 3.10, no torch, nothing of ours but cli, corpus.tokens
and the part of sampling without torch. The others import kinds and what is below them, and
measuring.held_out for the rows of the report; they are read only where something is exported.
"""
