"""The model as lm-eval sees it. Imports lm-eval: itself imported only where a task runs.

Shapes: B rows of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from lm_eval.models.huggingface import HFLM

from mico.checkpoint import set_execution
from mico.console import Console
from mico.errors import UserError, out_of_memory
from mico.packed.linear import PackedLinear, default_execution

T = TypeVar("T")


class EvaluatedModel(HFLM):
    """lm-eval's Hugging Face model around one that is loaded already.

    When memory runs out, dense weights made from packed ones are given up first, then the batch is halved; either is
    noted, and the requests at hand are done again. task: what messages name. halvings: of the batch, so far.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, console: Console) -> None:
        # A copy of the tokenizer, because lm-eval gives it a padding token.
        super().__init__(model, "causal", tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        self._device = model.get_input_embeddings().weight.device  # of a streamed model other parts are nowhere yet
        self.task, self.halvings, self._console = "", 0, console
        self._advance: Callable[[str], None] | None = None

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        # Every window scores up to `max_length` tokens; lm-eval cuts them in the same way.
        windows = sum(math.ceil(len(self.tok_encode(request.args[0])) / self.max_length) for request in requests)
        with self._bar(windows):
            return super().loglikelihood_rolling(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood (natural logarithm) of each continuation, and whether greedy decoding would give it."""
        rows = {tuple(context + continuation[:-1]) for _, context, continuation in requests}  # one row serves equals
        results = self._fitting(
            len(rows), lambda: super(EvaluatedModel, self)._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        )
        if any(math.isnan(value) for value, _ in results):
            raise UserError(
                f"task {self.task}: log-likelihoods are NaN: the model's weights are damaged, "
                f"or overflow its dtype (try --dtype float32)"
            )
        return results

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        return self._fitting(len(requests), lambda: super(EvaluatedModel, self).generate_until(requests, disable_tqdm))

    def _fitting(self, rows: int, work: Callable[[], T]) -> T:
        """The result of `work`, tried again with less memory as often as it takes."""
        while True:
            try:
                with self._bar(rows):
                    return work()
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if self.batch_size_per_gpu == 1 and not self._holds_dense():
                    raise UserError(
                        f"task {self.task}: out of memory on {self.device} with a batch of 1: "
                        f"use --device cpu, or a machine with more memory"
                    ) from error
            self._need_less()  # outside the except clause: its traceback would keep the tensors alive

    def _holds_dense(self) -> bool:
        return any(isinstance(module, PackedLinear) and module.execution == "dense" for module in self.model.modules())

    def _need_less(self) -> None:
        if self._holds_dense():
            set_execution(self.model, "lean")
            self._console.note(f"task {self.task}: out of memory on {self.device}, weights are unpacked at every call")
        else:
            self.batch_size_per_gpu //= 2
            self.halvings += 1
            self._console.note(
                f"task {self.task}: out of memory on {self.device}, batch halved to {self.batch_size_per_gpu}"
            )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def _bar(self, rows: int) -> Iterator[None]:
        """A progress bar over rows given to the model, unless one is shown already."""
        if self._advance is not None:
            yield
            return
        with self._console.bar(self.task, rows) as self._advance:
            try:
                yield
            finally:
                self._advance = None

    def _model_call(self, inps: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """Token ids (B, T) -> logits (B, T, V)."""
        logits_BTV = super()._model_call(inps, *args, **options)
        self._step(len(inps))
        return logits_BTV

    def _model_generate(self, context: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """Token ids (B, T) -> the same with what was generated behind."""
        ids_BT = super()._model_generate(context, *args, **options)
        self._step(len(context))
        return ids_BT

    def _step(self, rows: int) -> None:
        for _ in range(rows if self._advance is not None else 0):
            self._advance("")  # type: ignore[misc]


@contextmanager
def exact_execution(model: Any) -> Iterator[None]:
    """Inside, packed Linears compute with their dense weights, bit-equal to the dense export in every dtype.

    Kernels for 16 bits round otherwise. What MICO_EXECUTION asks for is left as it is.
    """
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    before = [module.execution for module in packed]
    if default_execution() == "auto":
        set_execution(model, "dense")
    try:
        yield
    finally:
        for module, execution in zip(packed, before, strict=True):
            if module.execution != execution:
                module.execution = execution
                module.forget()
