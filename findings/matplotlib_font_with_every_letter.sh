#!/usr/bin/env bash
# Versions: matplotlib==3.11.2
# Behaviour: matplotlib's own font list has a font whose character map holds every code point of Unicode, and which
#   draws boxes: "Last Resort High-Efficiency", its fallback for letters that no font has. Whoever looks for an installed
#   font that has the letters of a text finds this one on a machine that has none.
# Seen:
#   天空: ['Last Resort High-Efficiency']
#   ក: ['Last Resort High-Efficiency']
#   Ꭰ: ['Last Resort High-Efficiency']
#   🚗: ['Last Resort High-Efficiency']
#   1114112 letters, 371 pictures
# Why it matters here: Names of classes in any script are drawn by the first font that has all their letters, and told by
#   number where none has. With this font counted, every name would be drawn, as boxes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
  matplotlib==3.11.2
cd "$work"
MPLCONFIGDIR="$work" "$work/venv/bin/python" -W ignore - <<'EOF'
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

own = Path(matplotlib.get_data_path())  # the machine's own fonts are left out


def fonts_with(text):
    fonts = [font for font in font_manager.fontManager.ttflist if own in Path(font.fname).parents]
    return sorted({font.name for font in fonts if {*map(ord, text)} <= FT2Font(font.fname).get_charmap().keys()})


found = {text: fonts_with(text) for text in ("天空", "ក", "Ꭰ", "🚗")}
for text, names in found.items():
    print(f"{text}: {names}")
assert all(names == ["Last Resort High-Efficiency"] for names in found.values()), "no font with every letter any more"
path = next(font.fname for font in font_manager.fontManager.ttflist if font.name == "Last Resort High-Efficiency")
charmap = FT2Font(path).get_charmap()
print(f"{len(charmap)} letters, {len(set(charmap.values()))} pictures")
assert len(set(charmap.values())) < len(charmap) / 100
EOF
