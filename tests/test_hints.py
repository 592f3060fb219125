from __future__ import annotations

from pathlib import Path

import pytest

from ckd._hints import require


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("import a_module_that_is_not_there", r"pip install 'ckd\[fake\]'"),
        # What torchvision raises if it was compiled for another torch.
        (
            "import torch; torch.library.register_fake('fakevision::nms')(lambda x: x)",
            "operator fakevision::nms does not exist.*torch and torchvision of releases",
        ),
        ("import sys; sys.no_such_part", "torch and torchvision of releases"),
        ("raise OSError('undefined symbol')", "undefined symbol.*torch and torchvision of"),
    ],
)
def test_a_broken_dependency_is_a_sentence_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, remedy: str
) -> None:
    (tmp_path / "fakevision.py").write_text(code)
    (tmp_path / "fake_models.py").write_text("import fakevision")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=rf"the model needs fake_models.*{remedy}"):
        require("fake_models", extra="fake", purpose="the model")
