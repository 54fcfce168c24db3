"""Other people's SAE files, each turned into SAE Lens' configuration and tensors: one module a format.

`detect` finds out what a path holds; `metadata` joins what a file says about layer, model and k with what the caller
says; `files` reads tensors without running code. A format's module has one `convert`, which returns `Parts`. Tensors
leave here in SAE Lens' orientation and in float32.

Only `sae.loading` and `sae.io` import this package. It imports nothing of the reader and never sae-lens.
"""

from mechreward.sae.formats.detect import Found, find_format
from mechreward.sae.formats.metadata import Given, complete, layer_of_hook

__all__ = ["Found", "Given", "complete", "find_format", "layer_of_hook"]
