"""One engine start: refits through vLLM's own weight-transfer calls and `weft_vllm.control`. Prints one line of JSON.

Run as `python refit_case.py '{"family": "qwen3", "tied": true, …}' DIRECTORY`; `test_vllm_refit.py` does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from models import NEW_TOKENS, gaps, prompts, reference_tokens, save_checkpoint
from publishing import publish
from sources import SourceProcesses
from target_case import compare, pointers, remove, shared_memory
from training import train
from vllm import LLM, SamplingParams
from watching import watch

import weft_vllm
from weft.store_server import serve_store
from weft_vllm import steps

LONG_PROMPT = 70
"""Tokens: more than two blocks of the prefix cache."""
DEADLINES = {"rendezvous": 90.0, "offer": 20.0, "begin": 30.0, "move": 30.0, "vote": 20.0, "commit": 20.0}


class Case:
    """The engine under test and its sources."""

    def __init__(self, case: dict[str, Any], directory: Path, store: str) -> None:
        self.directory, self.case = directory, case
        self.dtype = getattr(torch, case["dtype"])
        saved = torch.bfloat16 if case["cast"] else self.dtype
        options = {"family": case["family"], "tied": case["tied"], "kv_heads": case["kv_heads"], "dtype": saved}
        self.models = {
            name: save_checkpoint(directory / name, seed=seed, **options) for seed, name in enumerate("ABC", 1)
        }
        casts = (("bfloat16", "float32"),) if case["cast"] else ()
        self.policy = {"casts": [list(cast) for cast in casts]}
        self.init = {
            "store": store, "job": "case", "replica": "rollout0", "sources": case["sources"],
            "transport": case["transport"], "deadlines": DEADLINES, "policy": self.policy,
        }  # fmt: skip
        self.sources = SourceProcesses(
            case["sources"], self.weights("A"), transport=case["transport"], store=store, job="case",
            policy=self.policy, deadlines=DEADLINES,
        )  # fmt: skip
        self.llm = LLM(
            str(directory / "A"), skip_tokenizer_init=True, enforce_eager=True, dtype=case["dtype"], max_model_len=128,
            block_size=32, enable_prefix_caching=True, tensor_parallel_size=case["tp"],
            enable_expert_parallel=case.get("ep", False),
            weight_transfer_config={"backend": "weft"}, additional_config={"weft": {"cpu_linear": case["cpu_linear"]}},
        )  # fmt: skip
        self.control = weft_vllm.control(self.llm)
        self.asked = prompts(3, LONG_PROMPT)

    def weights(self, name: str) -> str:
        return str(self.directory / name / "model.safetensors")

    def tokens(self) -> list[list[int]]:
        sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, detokenize=False, ignore_eos=True)
        answers = self.llm.generate([{"prompt_token_ids": p} for p in self.asked], sampling, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    def gaps(self, name: str) -> list[float]:
        model = self.models[name].to(self.dtype)
        return gaps(model, self.asked, self.tokens(), reference_tokens(model, self.asked))

    def failure(self, call: Any) -> str:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - the test asserts on what it says
            return f"{type(error).__name__}: {error}"
        return "nothing was raised"

    def refit(self, version: int, name: str) -> dict[str, Any]:
        self.sources.send("offer", version, self.weights(name))
        report = self.control.refit(version)
        config = self.models[name].config.to_dict()
        return {
            "gaps": self.gaps(name),
            "sent": self.sources.answers(), "digest": report.digest, "version": report.version, "nbytes": report.nbytes,
            "weight_version": self.llm.get_weight_version(),
            "seconds": dict(report.seconds), "pause": report.pause_seconds,
            "registrations": [worker["refit"]["registrations"] for worker in report.workers],
            "memory": self.llm.collective_rpc(compare, args=(str(self.directory / name), config)),
        }  # fmt: skip

    def run(self) -> dict[str, Any]:
        result: dict[str, Any] = {"config": self.models["A"].config.to_dict()}
        result["first_gaps"] = self.gaps("A")
        before = self.llm.collective_rpc(pointers)
        result["not_connected"] = self.failure(lambda: self.control.refit())
        result["serves_after_that"] = self.gaps("A")
        self.sources.send("open")
        self.llm.init_weight_transfer_engine({"init_info": self.init})
        result["opened"] = self.sources.answers()
        result["refits"] = [self.refit(1, "B"), self.refit(2, "C"), self.refit(3, "C")]

        self.sources.send("offer", 4, self.weights("A"))
        result["mismatch"] = self.failure(lambda: self.control.refit(99))
        result["sources_told"] = self.sources.answers()
        result["refused"] = self.failure(self.tokens)
        result["refused_chat"] = self.failure(lambda: self.llm.enqueue([{"prompt_token_ids": self.asked[0]}]))
        result["after_failure"] = self.refit(5, "B")

        self.tokens()
        with patch.object(steps, "forget_caches", lambda version, mode: iter(())):
            result["stale_cache"] = self.refit(6, "A")["gaps"]
        result["fresh_cache"] = self.refit(7, "A")["gaps"]
        result["pointers_stable"] = self.llm.collective_rpc(pointers) == before
        result["reports"] = self.llm.collective_rpc("weft_report")
        if self.case.get("watch"):
            result["watched"] = watch(self)
            result["trained"] = train(self)
        if self.case.get("published"):
            result["published"] = publish(self)
        return result


def main() -> None:
    server = serve_store(host="127.0.0.1", port=0)
    case = Case(json.loads(sys.argv[1]), Path(sys.argv[2]), server.url)
    with case.sources:
        print("RESULT " + json.dumps(case.run(), default=str), flush=True)
    shared = case.llm.collective_rpc(shared_memory)
    case.llm.llm_engine.engine_core.shutdown()
    remove(shared)
    server.close()


if __name__ == "__main__":
    main()
