"""A trained student in files that programs without ckd load; docs/export.md says how."""

from ckd.export.portable import ExportError
from ckd.export.write import FORMATS, Exported, Format, export_student

__all__ = ["FORMATS", "ExportError", "Exported", "Format", "export_student"]
