"""A model as graphs, of the unmasking step and of a pass behind a cache: exported here, run on a
Jetson.

    settings.py        the settings of an export
    step_graph.py      the step in operators that TensorRT has
    cached_graph.py    a pass behind a cache, for writing from the left
    int8.py            their weight products in INT8
    graphs.py          step, cached pass and encoder as ONNX graphs
    report.py          a graph beside the torch model, on the same rows
    bundle.py          the folder to copy to the device
    engine_builder.py  TensorRT engines, built where they run; NVIDIA's compiler as a check
    engine_runtime.py  what a folder holds, opened where it runs; ONNX Runtime's session
    tensorrt_session.py  TensorRT's
    reader.py          a cached pass and its cache, for the writers of sampling/left_to_right.py

For export_jetson.py, generate.py and measuring/device.py. settings.py, engine_builder.py and the
last three go into the bundle: Python 3.10, no torch, nothing of ours but cli, the readers of tokens
and conditions in corpus, and the part of sampling without torch. The others import kinds and what
is below them; they are read only where something is exported.
"""
