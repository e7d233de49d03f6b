"""Native calls beside other threads and signals."""

import signal
import subprocess
import sys
import threading
import time

import torch

import sslops
from sslops import _sums


def test_ctrl_c_ends_a_long_call():
    """As KeyboardInterrupt, within a second, and the process goes on"""
    script = """
import glob, signal, time, torch, sslops
def waited():  # by all threads for a core, which a busy machine has not: seconds
    return sum(int(open(file).read().split()[1]) for file in glob.glob("/proc/self/task/*/schedstat")) / 1e9
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
z = torch.randn(2, 32768, 256)
before = waited()
print("ready", flush=True)
try:
    sslops.nt_xent(z[0], z[1], backend="cpu")
    print("finished")
except KeyboardInterrupt:
    print(time.monotonic(), waited() - before)
print(float(sslops.nt_xent(z[0, :64], z[1, :64], backend="cpu")) > 0)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    begin = time.monotonic()  # one clock for all processes
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    ended, waited, goes_on = out.split()
    assert float(ended) - begin < 1 + float(waited)
    assert goes_on == "True"


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
    try:
        sslops.nt_xent(z[0], z[1], backend="cpu")
        during = counted[0]
    finally:
        done.set()
        thread.join()
    assert during > 20


def test_the_same_bits_over_many_runs(isa):
    """Of a loss with a tournament of tiles, one with a queue, and one over columns"""
    z0, z1 = torch.randn(2, 300, 40).requires_grad_()
    calls = (
        lambda: sslops.nt_xent(z0, z1, backend="cpu"),
        lambda: sslops.info_nce(z0, z1, torch.ones(600, 40), backend="cpu"),
        lambda: sslops.vicreg(z0, z1, backend="cpu"),
    )
    count = torch.get_num_threads()
    try:
        for call in calls:
            found = []
            for threads in (1, 2, 16):
                torch.set_num_threads(threads)
                found += [[loss := call(), *torch.autograd.grad(loss, (z0, z1))] for _ in range(20)]
            assert all(torch.equal(x, y) for each in found for x, y in zip(each, found[0], strict=True))
    finally:
        torch.set_num_threads(count)


def test_the_same_bits_of_long_sums():
    """torch cuts them among its threads: those over losses, for a temperature's gradient, over views and columns"""
    query, key = torch.randn(2, 70001, 2)
    tau, z, directions = torch.tensor(0.3, requires_grad=True), torch.randn(3, 3000, 8), torch.randn(4, 8)
    count, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss, metrics = sslops.info_nce(query, key, key[:3], temperature=tau, return_metrics=True, backend="cpu")
            others = [sslops.lejepa(z, directions=directions, lambd=0.0), _sums.total(query.t()), _sums.mean(query)]
            found.append([loss, *torch.autograd.grad(loss, tau), *metrics, *others])
    finally:
        torch.set_num_threads(count)
    assert all(torch.equal(x, y) for each in found for x, y in zip(each, found[0], strict=True))
    torch.testing.assert_close(_sums.total(query).double(), query.double().sum(), rtol=0, atol=1e-2)
    weight = query.clone().requires_grad_()
    _sums.mean(weight.square()).backward()
    torch.testing.assert_close(weight.grad, query * (2 / query.numel()))


def test_workers_of_a_data_loader(tmp_path):
    """Forked after the parent has used its threads, and spawned"""
    script = """
import torch, sslops
class Masks(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, k):
        z = torch.arange(1200.0).sin().view(2, 60, 10)
        return sslops.nt_xent(z[0], z[1], backend="cpu"), *sslops.random_mask(2, 50, 0.5, noise=z[0, :2].repeat(1, 5))
if __name__ == "__main__":
    torch.set_num_threads(2)
    expected = Masks()[0]
    for context in ("fork", "spawn"):
        for found in torch.utils.data.DataLoader(Masks(), None, num_workers=2, multiprocessing_context=context):
            assert all(map(torch.equal, found, expected))
    print("the same")
"""
    file = tmp_path / "workers.py"  # which spawned ones import
    file.write_text(script)
    run = subprocess.run([sys.executable, file], capture_output=True, text=True, timeout=60)
    assert run.stdout.split() == ["the", "same"], run.stderr
