import os

import torch

# Without a GPU the Triton kernels are interpreted. Triton must know when it is imported, and many packages
# import it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Of Triton 3.9, which otherwise warns that its default will change.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
