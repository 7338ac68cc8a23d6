"""Seconds, steps, images and memory of a run, over all its sessions."""

import time
from collections.abc import Callable
from typing import Any

# The fields of `spent`; "wall" and "peak_memory_mb" are those of the earlier sessions.
NOTHING_SPENT = {
    **{"wall": 0.0, "train": 0.0, "eval": 0.0, "steps": 0.0},
    **{"timed_images": 0, "peak_memory_mb": 0.0},
}


class Books:
    """The clock and the counts of one run; the first session begins when the object is made.

    Attributes:
      now: seconds on a clock that never goes back.
      trained: images in optimisation steps so far, every epoch counted.
      extracted: (image, slot) pairs encoded outside of the training step so far.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self.now = now
        self.trained = self.extracted = 0
        self._spent: dict[str, Any] = dict(NOTHING_SPENT)
        self._compiled = False  # the first step of a session compiles, and is not timed
        self._began = self._lap_began = self._step_began = now()

    def wall_seconds(self) -> float:
        """Seconds of this run over all sessions."""
        return self._spent["wall"] + self.now() - self._began

    def start_lap(self) -> None:
        """Starts a lap."""
        self._lap_began = self.now()

    def end_lap(self, name: str) -> None:
        """Adds the seconds of the lap to "train" or "eval", and starts the next lap."""
        now = self.now()
        self._spent[name] += now - self._lap_began
        self._lap_began = now

    def start_step(self) -> None:
        """Starts an optimisation step, which includes the wait for its batch."""
        self._step_began = self.now()

    def end_step(self, images: int) -> None:
        """Counts an optimisation step on `images`, once its loss is on the host."""
        if self._compiled:
            self._spent["steps"] += self.now() - self._step_began
            self._spent["timed_images"] += images
        self._compiled = True
        self.trained += images

    def peak_memory_mb(self) -> float:
        """The largest resident memory of any session so far, MiB."""
        import resource  # not on Windows, where the package can at least be imported

        here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return max(here, self._spent["peak_memory_mb"])

    def saved(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain JSON."""
        now = {"wall": self.wall_seconds(), "peak_memory_mb": self.peak_memory_mb()}
        counts = {"trained": self.trained, "extracted": self.extracted}
        return {"spent": self._spent | now, "counts": counts}

    def restore(self, saved: dict[str, Any]) -> None:
        """Continues from what `saved` gave in an earlier session."""
        self._spent = self._spent | saved["spent"]
        self.trained, self.extracted = saved["counts"]["trained"], saved["counts"]["extracted"]

    def summary(self) -> dict[str, Any]:
        """The part of summary.json that docs/metrics.md defines by seconds, counts and memory."""
        spent = self._spent
        timed = spent["timed_images"]
        return {
            "train_images": self.trained,
            "extracted_features": self.extracted,
            "wall_seconds": self.wall_seconds(),
            "train_seconds": spent["train"],
            "eval_seconds": spent["eval"],
            "training_images_per_second": timed / spent["steps"] if timed else None,
            "peak_memory_mb": self.peak_memory_mb(),
        }
