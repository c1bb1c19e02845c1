"""An engine that is none of ours, with a GPU's memory that others may open: gpu_exporter.py BYTES

Says the handle of its memory; then does what each line asks for and says what came of it: "write BASE64", "read".
At the end of its input it frees the memory and ends.
"""

import base64
import ctypes
import sys

cuda = ctypes.CDLL("libcuda.so.1")
size = int(sys.argv[1])


def call(name, *arguments):
    code = getattr(cuda, name)(*arguments)
    if code != 0:
        raise RuntimeError(f"{name} answered {code}")


def say(text):
    print(text, flush=True)


device, context, address = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
call("cuInit", 0)
call("cuDeviceGet", ctypes.byref(device), 0)
call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
call("cuCtxPushCurrent_v2", context)
call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
handle = (ctypes.c_char * 64)()
call("cuIpcGetMemHandle", handle, address)
say(base64.b64encode(handle.raw).decode())

for line in sys.stdin:
    what, *rest = line.split()
    if what == "write":
        data = base64.b64decode(rest[0])
        call("cuMemcpyHtoD_v2", address, data, ctypes.c_size_t(len(data)))
        call("cuStreamSynchronize", None)  # streams order nothing in another process
        say("written")
    elif what == "read":
        data = ctypes.create_string_buffer(size)
        call("cuMemcpyDtoH_v2", data, address, ctypes.c_size_t(size))
        say(base64.b64encode(data.raw).decode())

call("cuMemFree_v2", address)
call("cuCtxPopCurrent_v2", ctypes.byref(context))
call("cuDevicePrimaryCtxRelease_v2", device)
