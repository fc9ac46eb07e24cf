"""Numbers that go wrong: gradients that are not finite, and a loss that jumps. Watched on the device, asked for seldom."""

import torch
from torch import Tensor

from personmae import dist
from personmae.errors import Diverged

_SMOOTHING = 0.9  # of the running mean of the loss, per interval


class Guard:
    """Counts the steps that an engine has skipped, and compares each interval's loss with those before it.

    ``spike_factor`` is what the mean loss of an interval may at most be of the running mean before it. None watches nothing.
    ``loss_ema`` is that mean where a run goes on.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        max_skipped_steps: int,
        spike_factor: float | None = None,
        loss_ema: float | None = None,
    ):
        self._max_skipped_steps, self._spike_factor = max_skipped_steps, spike_factor
        self.consecutive = torch.zeros((), device=device)
        self.num_skipped = torch.zeros((), device=device)
        self._bad_here = torch.zeros((), dtype=torch.bool, device=device)  # this rank's own loss at the last step
        self._sum, self._count = (
            torch.zeros((), device=device),
            torch.zeros((), device=device),
        )  # of steps that were not skipped
        self.loss_ema = loss_ema

    def add(self, loss: Tensor, skipped: Tensor) -> None:
        """Take in a step. Nothing waits for the device."""
        self.consecutive = (self.consecutive + skipped) * skipped
        self.num_skipped = self.num_skipped + skipped
        self._bad_here = ~loss.isfinite()
        self._sum, self._count = self._sum + loss.nan_to_num(0, 0, 0) * (1 - skipped), self._count + 1 - skipped

    def exhausted(self) -> bool:
        """Whether too many steps in a row were skipped. Waits for the device. All ranks get the same answer."""
        return bool(self.consecutive >= self._max_skipped_steps)

    def last_counted(self, step: int, run_dir: str) -> bool:
        """Whether the last step changed the parameters: a state is saved only then. Waits for the device.

        Raises:
            Diverged: too many steps in a row were skipped. Called by all ranks together, as ``blame`` is.
        """
        if self.exhausted():
            raise Diverged(
                f"the gradient was not finite in {int(self.consecutive)} steps in a row, up to step {step}: {self.blame()}. "
                f"{run_dir} keeps an earlier state"
            )
        return not self.consecutive

    def spiked(self) -> bool:
        """Whether the loss since the last call is far above what it was before. Called by all ranks together."""
        if not self._spike_factor:
            return False
        total, count = dist.mean(torch.stack([self._sum, self._count])).tolist()
        self._sum, self._count = torch.zeros_like(self._sum), torch.zeros_like(self._count)
        if not count:
            return False
        recent = total / count
        if self.loss_ema is not None and recent > self._spike_factor * self.loss_ema:
            return True
        self.loss_ema = recent if self.loss_ema is None else _SMOOTHING * self.loss_ema + (1 - _SMOOTHING) * recent
        return False

    def blame(self) -> str:
        """Which ranks' own loss was not finite at the last step. Called by all ranks together."""
        ranks = [rank for rank, bad in enumerate(dist.all_flags(bool(self._bad_here))) if bad]
        if not ranks:
            return "every rank's loss was finite, the gradient was not"
        return f"the loss was not finite on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
