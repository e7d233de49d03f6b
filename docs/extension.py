"""Docstrings are plain text, and <z_i, z_j> in them is no HTML."""

import griffe


class PlainText(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("<", "&lt;")
