"""The training loop, top to bottom.

An optimizer step takes `accumulate` batches of `batch_size` images, fewer at the end of an epoch,
where a single image that is left over joins the last batch. Its gradient is the mean over all its
images.

Randomness is stateless: the order of an epoch is a function of (seed, epoch), augmentation and
dropout are functions of (seed, step). So a checkpoint needs no random state, and a resumed run
takes exactly the steps of an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ckd import models
from ckd._console import bar, console, say
from ckd._device import pick_device
from ckd._files import atomic_write
from ckd.backends import Explanation
from ckd.data import Batch, epoch_order, step_generator, training_batches
from ckd.train import checkpoint, report
from ckd.train.config import Config
from ckd.train.curves import draw_curves
from ckd.train.device import autocast, torch_state
from ckd.train.errors import Interrupted, TrainError
from ckd.train.evaluation import Scores, evaluate
from ckd.train.interrupt import stop_on_signals
from ckd.train.loggers import Loggers
from ckd.train.methods import method_class
from ckd.train.metrics import MetricsLog
from ckd.train.opening import backends_of, opening_lines
from ckd.train.page import write_page
from ckd.train.run import Run, run_folder, set_up
from ckd.train.saved import restore, save
from ckd.train.schedule import learning_rate
from ckd.train.stored import NONFINITE, STUDENT, read_result, resume_command


def train(config: Config, *, resume: bool = False, verbose: bool = True) -> dict[str, Any]:
    """Train a student as `config` says, in its run folder; returns the content of result.json.

    resume: continue from the newest checkpoint of that folder, from the start if it has none; the
    result of a finished run is returned without training.

    Raises ConfigError, TrainError and CheckpointError; Interrupted after Ctrl-C or SIGTERM; and
    DataError, BankError, ModelError and OSError for the inputs that the config names.
    """
    config.check()
    method_type = method_class(config)
    device = pick_device(config.device)
    memory = report.PeakMemory(device)
    with (
        contextlib.nullcontext() if verbose else console(quiet=True),
        run_folder(config, resume=resume) as folder,
        torch_state(config, device),
    ):
        # Without its student a run is finished once more, from its last checkpoint.
        whole = (folder / STUDENT).exists() or checkpoint.latest(folder) is None
        if (folder / report.RESULT).exists() and whole:
            say(f"{folder} is finished")
            return read_result(folder)
        run = set_up(config, device, method_type)
        if resume:
            restore(run)
        backends = backends_of(run)
        for line in (*opening_lines(run, backends), *run.notes):
            say(line)
        log = MetricsLog(folder, keep_bytes=run.progress.metrics_bytes)
        with Loggers(config, folder, run.records) as loggers, stop_on_signals() as stop:
            while run.progress.epoch < config.epochs:
                train_epoch(run, stop)
                record = end_epoch(run, memory)
                run.records.append(record)
                run.progress.metrics_bytes, run.progress.metrics_xxh3 = log.write(record)
                save(run)
                loggers.log(record)  # after the checkpoint: no resume trains and logs it again
                say(report.epoch_line(record, config.epochs, run.scored_images))
                if stop():
                    interrupt(run)
        return finish(run, backends)


def train_epoch(run: Run, stop: Callable[[], bool]) -> None:
    """Train on the rest of the current epoch, saving checkpoints on the way.

    stop: called after every step but an epoch's last; where it gives True, the run is saved and
    left by `interrupt`.
    """
    config, progress, n = run.config, run.progress, len(run.train_set)
    order = epoch_order(n, seed=config.seed, epoch=progress.epoch)[progress.rows :]
    sizes = training_batches(len(order), config.batch_size)
    batches = run.train_set.batches(order, sizes, run.device, config.workers)
    run.student.train()
    run.method.train()
    images_done = bar(
        f"epoch {progress.epoch + 1}/{config.epochs}{report.time_left(run.records, config.epochs)}",
        total=n,
        initial=progress.rows,
        unit="images",
    )
    saved = mark = time.monotonic()
    with images_done:
        while group := list(itertools.islice(batches, config.accumulate)):
            values = optimizer_step(run, group)
            now = time.monotonic()
            progress.time_s += now - mark
            mark = now
            images_done.update(progress.rows - images_done.n)
            images_done.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
            if progress.rows == n:
                break  # `train` saves after the evaluation
            every = config.checkpoint_steps
            if (
                stop()
                or now - saved > 60 * config.checkpoint_minutes
                or (every and progress.step % every == 0)
            ):
                save(run)
                if stop():
                    interrupt(run)
                saved = mark = time.monotonic()  # saving is not training time


def optimizer_step(run: Run, group: Sequence[Batch]) -> dict[str, float]:
    """One optimizer step over the batches of `group`; returns the loss terms of the last batch.

    Raises TrainError, before the weights change, if a loss or the gradient is not finite.
    """
    config, progress = run.config, run.progress
    rng = step_generator(config.seed, progress.step, run.device)
    torch.manual_seed(rng.initial_seed() + 1)  # dropout: not the augmentation's seed
    rate = current_rate(run)
    for parameter_group in run.optimizer.param_groups:
        parameter_group["lr"] = rate
    rows = sum(len(batch.labels) for batch in group)
    sums: dict[str, float] = {}
    for batch in group:
        images = run.augment(batch.images, rng)
        with autocast(config, run.device):
            output = forward(run, images)
            loss, terms = run.method(output, batch, images)
        # Reading the loss synchronises with the GPU once a batch, so that no bad step is taken.
        numbers = torch.stack([loss, *terms.values()]).tolist()
        values = dict(zip(("loss", *terms), numbers))
        refuse_nonfinite(run, values, [batch])
        # Batches count by their images.
        run.scaler.scale(loss * (len(batch.labels) / rows)).backward()
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value * len(batch.labels)

    run.scaler.unscale_(run.optimizer)
    gradients = [
        p.grad for g in run.optimizer.param_groups for p in g["params"] if p.grad is not None
    ]
    norm = torch.nn.utils.get_total_norm(gradients)
    if not run.scaler.is_enabled():  # the scaler skips steps that overflow
        refuse_nonfinite(run, {"gradient norm": norm.item()}, group)
    if config.clip_norm:
        parameters = [p for g in run.optimizer.param_groups for p in g["params"]]
        torch.nn.utils.clip_grads_with_norm_(parameters, config.clip_norm, norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.update_averages()

    progress.step += 1
    progress.rows += rows
    for name, total in sums.items():
        progress.sums[name] = progress.sums.get(name, 0.0) + total
    return values


def forward(run: Run, images: Tensor) -> models.ModelOutput:
    """The student's output for augmented uint8 images.

    Raises TrainError for a single image that batch normalisation refuses: its map is 1 x 1.
    """
    try:
        return run.forward(models.prepare(run.student, images))
    except ValueError as error:
        if len(images) > 1 or "more than 1 value per channel" not in str(error):
            raise
        raise TrainError(
            f"{run.config.student} cannot be trained on one image at a time, since its batch "
            "normalisation sees one value per channel; pass a --batch-size of at least 2, and at "
            "least two images"
        ) from error


def current_rate(run: Run) -> float:
    """The learning rate of the next step."""
    config = run.config
    return learning_rate(
        run.progress.step,
        peak=config.lr,
        steps_per_epoch=run.steps_per_epoch,
        epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        per_epoch=config.paper_compat,
    )


def end_epoch(run: Run, memory: report.PeakMemory) -> dict[str, Any]:
    """Evaluate, and reset the progress for the next epoch; returns the line for metrics.jsonl."""
    config, progress = run.config, run.progress
    began = time.monotonic()
    scores = Scores(None, None, 0, 0)
    if run.test_set is not None:
        scores = evaluate(
            run.exported.model,
            run.test_set,
            batch_size=config.batch_size,
            device=run.device,
            workers=config.workers,
        )
    record = {
        "epoch": progress.epoch + 1,
        "step": progress.step,
        # In this order also after a resume: state.json sorts its names.
        **{name: progress.sums[name] / progress.rows for name in sorted(progress.sums, key=_order)},
        "test_accuracy": scores.accuracy,
        "test_loss": scores.loss,
        "lr": run.optimizer.param_groups[0]["lr"],
        **run.method.numbers(),
        "time_s": progress.time_s,
        "images_per_s": progress.rows / progress.time_s,
        "eval_time_s": time.monotonic() - began,
        **memory.read(),
    }
    progress.epoch += 1
    progress.rows, progress.sums, progress.time_s = 0, {}, 0.0
    return record


def _order(term: str) -> tuple[bool, str]:
    return term != "loss", term


def refuse_nonfinite(run: Run, values: Mapping[str, float], group: Sequence[Batch]) -> None:
    """Raise TrainError if a value is NaN or infinite, after writing the sample ids to a file."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if not bad:
        return
    folder, progress = run.config.folder, run.progress
    path = folder / NONFINITE
    content = {
        "terms": bad,
        "values": {name: str(value) for name, value in values.items()},  # JSON has no NaN
        "step": progress.step,
        "epoch": progress.epoch + 1,
        "sample_ids": [i for batch in group for i in batch.sample_ids.tolist()],
    }
    atomic_write(path, (json.dumps(content, indent=1) + "\n").encode())
    # The total is not finite whenever one of its terms is not: name the term.
    named = [name for name in bad if name != "loss"] or bad
    raise TrainError(
        f"{' and '.join(named)} is not finite at step {progress.step} "
        f"(epoch {progress.epoch + 1}); the step was not taken, the batch is listed in {path}. "
        "Try a lower --lr, --clip-norm 1, or --amp off"
    )


def interrupt(run: Run) -> NoReturn:
    """Raise Interrupted; the caller has just saved the run."""
    raise Interrupted(
        f"stopped after step {run.progress.step}; go on with: {resume_command(run.config.folder)}"
    )


def finish(run: Run, backends: Mapping[str, Explanation]) -> dict[str, Any]:
    """Write student.safetensors, curves.png, report.html and, last, result.json, whose content is
    returned."""
    folder = run.config.folder
    student = run.exported
    classes = () if student.model.num_classes is None else run.train_set.class_names
    models.save(student.model, folder / STUDENT, class_names=classes, teachers=student.teachers)
    title = f"{run.config.method}: {run.config.student} on {run.config.data}"
    try:
        draw_curves(run.records, folder / "curves.png", title)
    except ImportError as error:
        say(f"no curves.png: {error}")
    parameters = models.parameter_count(student.model)
    result = report.summary(run.config, run.records, parameters, run.device)
    result |= {
        "train_images": len(run.train_set),
        "test_images": run.scored_images,
        "test_correct": report.correct_images(result["test_accuracy"], run.scored_images),
        "held_out": run.train_set.held_out,
        "backend": ", ".join(sorted({one.chosen for one in backends.values()})) or None,
    }
    write_page(run, result)
    report.write_result(folder, result)
    checkpoint.sweep(folder)
    return result
