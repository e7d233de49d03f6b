"""Native calls beside other threads and signals."""

import signal
import subprocess
import sys
import threading
import time

import torch

import sslops
from sslops import _C


def test_ctrl_c_ends_a_long_call():
    """As KeyboardInterrupt, and the process goes on"""
    script = """
import time, torch, sslops
z = torch.randn(2, 32768, 256)
print("ready", flush=True)
begin = time.monotonic()
try:
    sslops.nt_xent(z[0], z[1], backend="cpu")
    print("finished")
except KeyboardInterrupt:
    print("interrupted")
print(float(sslops.nt_xent(z[0, :64], z[1, :64], backend="cpu")) > 0)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    out, _ = process.communicate(timeout=60)
    assert out.split() == ["interrupted", "True"]
    assert time.monotonic() - begin < 10  # a second, and the interpreter's own end on a busy machine


def test_several_threads():
    """Each gets its own result, whatever the others do, and however many threads torch has at the time"""
    z0, z1 = torch.randn(2, 300, 40)
    expected = sslops.nt_xent(z0, z1, reduction="none", backend="cpu")
    wrong = []

    def work():
        for _ in range(20):
            if not torch.equal(sslops.nt_xent(z0, z1, reduction="none", backend="cpu"), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    count = torch.get_num_threads()
    for k in range(20):
        torch.set_num_threads(1 + k % 3)
    for thread in threads:
        thread.join()
    torch.set_num_threads(count)
    assert not wrong


def test_the_gil_is_released():
    """Another thread counts on while a native call runs"""
    z = torch.randn(2, 8192, 128)
    counted, done = [0], threading.Event()

    def count():
        while not done.is_set():
            counted[0] += 1
            time.sleep(0.001)

    thread = threading.Thread(target=count)
    thread.start()
    _C.nt_xent_forward(
        z[0], z[1], 0.5, True, torch.float32, 0,
        torch.empty(16384), torch.empty(0, 16384), torch.empty(16384), torch.empty(3, 16384),
    )  # fmt: skip
    during = counted[0]
    done.set()
    thread.join()
    assert during > 20
