"""Print the classes of the real `tensorrt_bindings` on sys.path as JSON: members, and arguments of each method.

The bindings link TensorRT's own libraries, which are not here. TensorRT-RTX's answer under their names: enough
to import the module and to read its names, and nothing else is done. The one symbol that only TensorRT has is replaced
in a copy of the bindings by another harmless one.

Run: python tensorrt_names.py BINDINGS_FOLDER RTX_LIBRARIES_FOLDER WORK_FOLDER
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

LIBRARIES = {
    "libnvinfer.so": "libtensorrt_rtx.so.1",
    "libnvinfer_plugin.so": "libtensorrt_rtx.so.1",
    "libnvonnxparser.so": "libtensorrt_onnxparser_rtx.so.1",
}
ONLY_TENSORRT, STAND_IN = b"initLibNvInferPlugins\0", b"getInferLibVersion\0"
CHILD = "--child"


def main() -> None:
    """Prepare a copy of the bindings and read it in a process of its own, whose loader finds the stand-ins."""
    if sys.argv[1] == CHILD:
        sys.setdlopenflags(os.RTLD_LAZY)  # functions that nobody calls may stay unresolved
        import tensorrt_bindings

        print(json.dumps({"version": tensorrt_bindings.__version__, "classes": classes(tensorrt_bindings)}))
        return
    bindings, libraries, work = (Path(argument).resolve() for argument in sys.argv[1:])
    shutil.copytree(bindings / "tensorrt_bindings", work / "tensorrt_bindings")
    module = work / "tensorrt_bindings" / "tensorrt.so"
    module.write_bytes(module.read_bytes().replace(ONLY_TENSORRT, STAND_IN.ljust(len(ONLY_TENSORRT), b"\0")))
    major = re.search(rb"libnvinfer\.so\.(\d+)\0", module.read_bytes())
    assert major is not None
    for name, stand_in in LIBRARIES.items():
        (work / f"{name}.{major[1].decode()}").symlink_to(libraries / stand_in)
    environment = {"LD_LIBRARY_PATH": f"{work}:{libraries}", "PYTHONPATH": str(work)}
    subprocess.run([sys.executable, __file__, CHILD], env=os.environ | environment, check=True)


def classes(module: Any) -> dict[str, dict[str, int | None]]:
    """Class -> public member -> number of arguments (the longest overload); None for what is no method."""
    return {
        name: {member: arguments(getattr(kind, member)) for member in dir(kind) if member[0] != "_"}
        for name, kind in inspect.getmembers(module, inspect.isclass)
    }


def arguments(member: Any) -> int | None:
    """Arguments after self, from the signatures that pybind11 puts at the start of a docstring."""
    if not callable(member) or not member.__doc__:
        return None
    signatures = re.findall(r"^(?:\d+\. )?\w+\((self: [^)]*(?:\)[^)\n]*)*)\) ->", member.__doc__, flags=re.M)
    return max((len(re.findall(r"(?:^|, )\w+: ", signature)) - 1 for signature in signatures), default=None)


if __name__ == "__main__":
    main()
