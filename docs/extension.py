"""What mkdocstrings makes of our docstrings: plain text, where <z_i, z_j> is no HTML, and `a, b:` arguments that share
their description.
"""

from typing import Any

import griffe


class Docstring(griffe.Docstring):
    def parse(self, *args: Any, **options: Any) -> list[griffe.DocstringSection]:
        sections = super().parse(*args, **options)
        for section in sections:
            if section.kind is griffe.DocstringSectionKind.parameters:
                for together in section.value:
                    self.fill(together)
        return sections

    def fill(self, together: griffe.DocstringParameter) -> None:
        """Gives arguments described together their type, if it is one, and their defaults"""
        names, known = together.name.split(", "), getattr(self.parent, "parameters", ())
        found = [known[name] for name in names if name in known]
        if len(names) == 1 or not found:
            return
        types, defaults = [x.annotation for x in found], [str(x.default or "required") for x in found]
        if len(set(map(str, types))) == 1:
            together.annotation = types[0]
        if set(defaults) != {"required"}:
            together.value = defaults[0] if len(set(defaults)) == 1 else ", ".join(defaults)


class PlainText(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("<", "&lt;")
            obj.docstring.__class__ = Docstring
