import json
import sys
from pathlib import Path

from transformers import pipeline

checkpoint, text = sys.argv[1], sys.argv[2]
Path("answer.json").write_text(json.dumps(pipeline("fill-mask", model=checkpoint)(text)))
