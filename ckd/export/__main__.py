"""`ckd export RUN --out FILE`: a trained student for programs without ckd."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from ckd import models
from ckd._console import say
from ckd._errors import ConfigError
from ckd._files import user_path
from ckd._hints import check_choices
from ckd._output import check_output
from ckd.cli import command
from ckd.export.write import Exported, Format, chosen, export_student


@dataclass(frozen=True)
class Export(command.Output):
    """Write a trained student for programs without ckd, and print a program that loads it.

    onnx and torch-export take pixels in 0..1 and give logits and embedding; safetensors holds the
    weights under the names of timm or transformers. docs/export.md says more, and how to load a
    student in C++.

    Example: ckd export runs/mine --out student.onnx > load.py
    """

    student: tyro.conf.Positional[str]
    """A run folder, a student's .safetensors file or a model spec."""
    out: Path
    """The file to write; its suffix, .onnx, .pt2 or .safetensors, chooses the format."""
    format: Format | None = None
    """Of the file; default: by its suffix."""
    weights: Path | None = None
    """The weights of a student that is a model's name: a file, or a run folder."""

    def run(self) -> None:
        check_choices(self)
        chosen(self.out, self.format)
        check_output(self.out)
        self._spare_the_student()
        student = models.load_student(self.student, weights=self.weights)
        exported = export_student(student, self.out, self.format)
        sizes = [f"{file} ({file.stat().st_size:,} bytes)" for file in exported.files]
        if self.json:
            print(json.dumps(_document(self.student, exported), indent=2))
            return
        say(f"# wrote {', '.join(sizes)}; this program loads it without ckd:\n")
        print(exported.program, end="")

    def _spare_the_student(self) -> None:
        """Raise ConfigError if a file that is written is that from which the student is read."""
        written = (self.out, self.out.with_name(f"{self.out.stem}.embedding.safetensors"))
        for source in (self.student, self.weights):
            if source is None:
                continue
            for file in (user_path(source), user_path(source) / models.STUDENT_FILE):
                for one in written:
                    if file.is_file() and one.exists() and file.samefile(one):
                        raise ConfigError(
                            f"--out {self.out}: {one} is the student itself; name another file"
                        )


def _document(student: str, exported: Exported) -> dict[str, object]:
    return {
        "schema_version": 1,
        "student": student,
        "format": exported.format,
        "files": [{"file": str(one), "bytes": one.stat().st_size} for one in exported.files],
        "program": exported.program,
        "metadata": dict(exported.metadata),
    }


COMMAND = Export


def main(argv: Sequence[str] | None = None, prog: str = "python -m ckd.export") -> int:
    """Run the command line; returns the exit status."""
    return command.run(lambda given: command.parse(Export, given, prog), argv)


if __name__ == "__main__":
    sys.exit(main())
