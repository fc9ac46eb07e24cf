"""The probe of an encoder while it is pre-trained: what its frozen features find at each checkpoint (``probe.benchmark``).

It works on a copy and draws no random numbers, so the run it looks at is the run without it.
"""

import copy

import torch

from personmae import config, dist
from personmae.engine.base import Engine
from personmae.errors import RankError, Stopped, UserError
from personmae.model.vit import VisionTransformer
from personmae.monitor import run_log
from personmae.monitor.rank_metrics import RankMetrics
from personmae.reid import probe
from personmae.reid.datasets import describe, load_benchmark


class Prober:
    """Measures the encoder of an engine on a benchmark. Every method is called by all ranks together."""

    def __init__(self, settings: config.Pretrain, encoder: VisionTransformer, world: dist.World):
        """Raises a UserError where the benchmark cannot be read."""
        assert settings.probe.benchmark
        assert settings.probe.root
        self._benchmark = load_benchmark(settings.probe.benchmark, settings.probe.root)
        self._encoder = copy.deepcopy(encoder).requires_grad_(False)  # before it is compiled or sharded
        self._model, self._device = settings.model, world.device
        self._num_threads = settings.data.num_threads or dist.threads_per_rank(world)
        if world.is_first:
            print(f"probe: {describe(self._benchmark).note}", flush=True)

    def run(
        self, engine: Engine, step: int, log: run_log.RunLog, metrics: RankMetrics, stop: dist.StopSignal
    ) -> dict[str, float]:
        """Both mAPs for the log on the first rank, nothing on the others.

        Nothing too where it was stopped, or nothing can be compared, as features that are not finite cannot. That is told,
        for a probe ends no training. An image that cannot be read does.
        """

        def stopped() -> bool:
            metrics.beat("evaluate", step)
            return stop.requested

        with log.pausing():
            with engine.full_params(engine.module.get_submodule("encoder")) as params, torch.no_grad():
                for own, given in zip(self._encoder.parameters(), params, strict=True):
                    own.copy_(given)
            try:
                record = probe.measure(
                    self._benchmark,
                    self._encoder,
                    img_size=self._model.img_size,
                    mean=self._model.mean,
                    std=self._model.std,
                    device=self._device,
                    num_threads=self._num_threads,
                    log=log.log,
                    stopped=stopped,
                )
            except RankError:  # only this rank knows
                raise
            except (Stopped, UserError) as error:  # all ranks do
                log.log(f"the probe is left out: {error}")
                return {}
        return {f"probe_{name}_map": scores["mAP"] for name, scores in record["probe"].items()} if record else {}
