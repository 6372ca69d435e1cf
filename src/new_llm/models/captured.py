"""CUDA graphs: a call's kernels, recorded once, start again by a single launch."""

import functools
import gc
from collections.abc import Callable

import torch


class CapturedCall:
    """Makes a call at first as it is, captures it the second time, and then replays that.

    The call takes nothing and returns nothing: what it reads and changes are tensors that keep their places, and it
    asks the device nothing. Elsewhere than on a GPU it is made as it is every time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_warm = False  # what is made at a first call, such as cuBLAS's workspaces, can't be captured
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, call: Callable[[], None]) -> None:
        """Make the call."""
        if self.device.type != "cuda" or not self.is_warm:
            call()
            self.is_warm = True
            return
        if self.graph is None:
            with torch.cuda.device(self.device):
                self.graph = capture(call, find_pool(self.device, torch.cuda.current_stream().cuda_stream))
        self.graph.replay()


def capture(call: Callable[[], None], keeper: torch.cuda.CUDAGraph | None = None) -> torch.cuda.CUDAGraph:
    """The graph of a call, which is not made; `keeper` is one whose pool of memory it shares.

    `torch.cuda.graph` also waits for the device and frees all cached memory, which takes longer than some tokens.
    """
    graph, stream = torch.cuda.CUDAGraph(), find_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    collects = gc.isenabled()
    gc.disable()  # an old graph must not be destroyed meanwhile
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(*([] if keeper is None else [keeper.pool()]), capture_error_mode="thread_local")
            try:
                call()
            finally:
                graph.capture_end()
    finally:
        if collects:
            gc.enable()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


@functools.cache
def find_stream(device: int) -> torch.cuda.Stream:
    """The stream of all captures: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


@functools.cache
def find_pool(device: torch.device, stream: int) -> torch.cuda.CUDAGraph:
    """A graph whose pool all graphs replayed on a stream share; their calls leave nothing in it.

    A pool of its own for each graph would stay reserved when the graph is gone.
    """
    number = torch.zeros(1, device=device)

    def fill() -> None:
        number.zero_()

    return capture(fill)
