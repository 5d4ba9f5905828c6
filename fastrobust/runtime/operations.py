"""Floating-point operations of what is run."""

from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts those of what is run inside, by torch's table: multiplications and additions of convolutions and matrix
    products. torch's own FlopCounterMode also tells modules apart, and for that refuses `torch.autograd.grad`, which attacks
    use."""

    def __init__(self):
        from torch.utils.flop_counter import flop_registry  # imports Triton, which takes a while

        super().__init__()
        self.number, self.table = 0, flop_registry

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if (known := self.table.get(function._overloadpacket)) is not None:
            self.number += known(*args, **(kwargs or {}), out_val=out)
        return out
