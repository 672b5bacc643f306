"""Right answers and no deadlock, however the kernels meet threads: many callers, forks, nested regions, new counts."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import flat, needs_native

import fastseq

pytestmark = needs_native


def modules():
    return [
        (fastseq.nn.LSTM(32, 48), torch.randn(20, 5, 32)),
        (fastseq.nn.GRU(32, 48, num_layers=2), torch.randn(20, 1, 32)),
        (fastseq.nn.RNN(32, 48, bidirectional=True), torch.randn(20, 64, 32)),
        (fastseq.nn.GRUCell(32, 48), torch.randn(3, 32)),
    ]


def outcome(module, x) -> list[torch.Tensor]:
    """Result and gradients, without touching .grad, which threads would share."""
    out = flat(module(x))
    return [*out, *torch.autograd.grad(out[0].sin().sum(), list(module.parameters()))]


def test_eight_threads_share_a_module():
    for module, x in modules():
        expected = outcome(module, x)
        failures: list[BaseException | str] = []

        def caller(module=module, x=x, expected=expected, failures=failures):
            try:
                for _ in range(5):
                    for a, b in zip(outcome(module, x), expected, strict=True):
                        torch.testing.assert_close(a, b)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=caller, daemon=True) for _ in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(120)
            assert not t.is_alive(), "a caller is stuck"
        assert not failures, failures[0]


def test_thread_count_may_change_between_calls():
    before = torch.get_num_threads()
    try:
        for module, x in modules():
            results = []
            for count in (1, 2, 3, 5, 1, 2):
                torch.set_num_threads(count)
                results.append(outcome(module, x))
            for result in results[1:]:
                for a, b in zip(result, results[0], strict=True):  # sums in another order
                    roundings = 8 * torch.finfo(b.dtype).eps * max(1.0, float(b.abs().max()))
                    torch.testing.assert_close(a, b, rtol=0, atol=roundings)
    finally:
        torch.set_num_threads(before)


def run_python(code: str, timeout: int = 240, **environment: str) -> str:
    """Run code in a process of its own, so that a deadlock ends at the timeout and is seen."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_forked_workers_run_after_the_parent_has():
    run_python(
        """
        import torch, fastseq
        from torch.utils.data import DataLoader, Dataset

        torch.manual_seed(0)
        layer = fastseq.nn.GRU(16, 32)
        with torch.no_grad():
            expected = layer(torch.ones(20, 40, 16))[0]

        class Rows(Dataset):
            def __len__(self):
                return 8

            def __getitem__(self, index):
                with torch.no_grad():
                    return layer(torch.ones(20, 40, 16))[0]

        for batch in DataLoader(Rows(), batch_size=2, num_workers=2):
            torch.testing.assert_close(batch[0], expected)
            torch.testing.assert_close(layer(torch.ones(20, 40, 16))[0], expected)  # and the parent runs on
        """
    )


def test_forked_process_trains_after_the_parent_has():
    run_python(
        """
        import os, torch, fastseq

        layer = fastseq.nn.LSTM(16, 32)
        layer(torch.ones(20, 40, 16))[0].sum().backward()  # autograd's own threads are not forked; the kernels are
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            with torch.no_grad():
                layer(torch.ones(20, 40, 16))
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        """
    )


def test_nested_parallel_regions_give_a_team_of_one():
    run_python(
        """
        import torch, fastseq

        torch.manual_seed(0)
        layer = fastseq.nn.GRU(16, 32)
        x = torch.randn(20, 40, 16)
        with torch.no_grad():
            expected = layer(x)[0]
            futures = [torch.jit.fork(lambda: layer(x)[0]) for _ in range(4)]
            for future in futures:
                torch.testing.assert_close(torch.jit.wait(future), expected)
        """
    )


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts a process's threads as Linux lists them")
def test_a_call_asks_for_no_thread_that_has_nothing_to_do_at_a_step():
    """One row with few units is one thread's work at every step: another would only be waited for."""
    run_python(
        """
        import os, torch, fastseq

        torch.set_num_threads(2)
        torch.set_grad_enabled(False)
        small, large = fastseq.nn.RNN(128, 128), fastseq.nn.LSTM(256, 256)
        count = lambda: len(os.listdir("/proc/self/task"))
        x, wide = torch.randn(100, 1, 128), torch.randn(100, 1, 256)
        before = count()
        small(x)
        assert count() == before, "a second thread was asked"
        large(wide)
        assert count() == before + 1, "no second thread was asked where there is work for it"
        """
    )


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="gives threads their cores as Linux does")
@pytest.mark.skipif(
    hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < 2, reason="wants a core for each thread"
)
def test_a_thread_sleeps_while_the_other_is_not_scheduled_and_results_are_the_same():
    """The other thread shares its core with a busy process, so it is late again and again."""
    run_python(
        """
        import os, resource, subprocess, sys, torch, fastseq

        torch.set_num_threads(2)
        torch.set_grad_enabled(False)
        layer, x = fastseq.nn.LSTM(256, 256), torch.randn(2000, 1, 256)
        tasks = lambda: {int(task) for task in os.listdir("/proc/self/task")}
        sleeps = lambda: resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        main, before = os.getpid(), tasks()
        expected = layer(x)[0]
        (other,) = tasks() - before
        here, there = sorted(os.sched_getaffinity(0))[:2]
        os.sched_setaffinity(main, {here})
        os.sched_setaffinity(other, {there})
        busy = f"import os; os.sched_setaffinity(0, [{there}]); print(flush=True)" + chr(10)
        busy += f"while os.getppid() == {main}: pass"
        with subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            count = sleeps()
            for _ in range(3):
                assert torch.equal(layer(x)[0], expected)
            count = sleeps() - count
            process.kill()
        assert count >= 10, f"slept {count} times: at the ends of calls, but not within them"
        """,
        OMP_WAIT_POLICY="passive",
    )


@pytest.mark.parametrize("threads", ["2", "4"])
def test_oversubscribed_machine_moves_on(threads):
    """Several processes with more threads than cores: a barrier that never yields would crawl past the timeout."""
    code = """
        import torch, fastseq
        layer = fastseq.nn.LSTM(64, 64)
        with torch.no_grad():
            for _ in range(20):
                layer(torch.randn(50, 1, 64))
        """
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(run_python, code, OMP_NUM_THREADS=threads) for _ in range(3)]:
            done.result()
