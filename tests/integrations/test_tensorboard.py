"""What a real event file says of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rig import rig
from runs import made_up_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from controlprune.integrations.tensorboard import ToTensorBoard, heat_map


def test_scalars_of_every_update_and_the_map_at_the_end(tmp_path: Path) -> None:
    run = rig(total_steps=40)
    with SummaryWriter(str(tmp_path)) as writer:
        run.controller.on_update(ToTensorBoard(writer))
        run.train(0, 40)
        run.controller.finalize()
    found = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    rows = {row.step: row for row in run.controller.history}
    scalars = {e.step: e.value for e in found.Scalars("prune/flops/use")}
    assert scalars.keys() == rows.keys()
    assert scalars[40] == np.float32(rows[40].realised["flops"])
    assert found.Images("prune/active")[-1].step == 40


def test_the_map_is_white_where_all_is_on() -> None:
    history = made_up_run(groups=3)
    image = heat_map(history, pixels=2)
    assert image.shape == (6, len(history))
    assert image[0, 0] == round(255 * history[0].active[0] / history.sizes[0])
