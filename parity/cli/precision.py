"""`parity precision`: what narrower numbers cost, and whether they cost both twins the same."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from parity.cli.options import (
    Data,
    Device,
    Dropout,
    Preset,
    Rate,
    Rows,
    Seed,
    Width,
    check_data,
    check_dtype,
    in_one_line,
    run_config,
)
from parity.twins.names import DTYPES


def precision(
    out: Annotated[Path, typer.Option(help="Folder for precision.png and precision.json.")],
    data: Data = None,
    preset: Preset = "tiny",
    steps: Annotated[int, typer.Option(min=1, help="Steps of every training.")] = 200,
    dtype: Annotated[
        str, typer.Option(help=f"float64, then any of {', '.join(DTYPES[1:])}, by commas.")
    ] = "float64,float32,bfloat16",
    batch_size: Rows = 8,
    width: Width = 64,
    learning_rate: Rate = 1e-3,
    dropout: Dropout = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Train both twins in several dtypes and judge each by its distance from float64.

    Rounding differs between frameworks and neither is more right, so what counts is the ratio of
    the two errors: 1 is a fair draw, and beyond 4 one side computes in another way.

    Exit codes: 0 all ratios end within 4, 1 one does not, 2 bad input.

    Example:

    parity precision --out reports/precision --dtype float64,float32,bfloat16,float16
    """
    errors = Console(stderr=True)
    with in_one_line(errors):
        check_data(data)
        dtypes = tuple(name.strip() for name in dtype.split(","))
        for name in dtypes:
            check_dtype(name)
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out}: that is a file. Name a folder.")
        with errors.status("loading jax and torch"):
            from parity.pair.text import Corpus
            from parity.system.devices import choose_devices
            from parity.system.files import write_file
            from parity.training import as_line, draw_precision, precision_report
            from parity.training.precision import check_dtypes

            check_dtypes(dtypes)
            devices = choose_devices(device)
            corpus = Corpus.load(data)
            config = run_config(
                corpus,
                preset,
                dict(dropout=dropout, dtype="float64"),
                dict(
                    learning_rate=learning_rate,
                    schedule="cosine",
                    warmup_steps=steps // 20,
                    total_steps=steps,
                ),
                rows=batch_size,
                width=width,
                seed=seed,
            )
        out.mkdir(parents=True, exist_ok=True)
        from parity.system.progress import interruptible, shown

        with shown(errors, dtypes) as show, interruptible(show) as progress:
            report = precision_report(config, corpus, devices, steps, dtypes, progress)
        write_file(out / "precision.json", as_line(report.to_dict()))
        draw_precision(out / "precision.png", report)
        console, verdicts = Console(highlight=False, soft_wrap=True), report.verdicts
        gap = f"gap between the losses {report.float64_gap:.1e}"
        console.print(f"float64: {gap}: {verdicts['float64']}")
        for name, ratios in report.ratios.items():
            ratio = f"error of flax_gpt over that of torch_gpt {ratios[-1]:.2f}, allowed 0.25 to 4"
            console.print(f"{name}: {ratio}: {verdicts[name]}")
        console.print(f"wrote {out / 'precision.png'} and precision.json")
    raise typer.Exit(0 if report.verdict == "PASS" else 1)
