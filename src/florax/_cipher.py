"""Threefry-2x32 with 20 rounds (Salmon et al., SC 2011), the cipher of `jax.random`, to the bit.

JAX's own is a loop where it runs on a CPU and a call of foreign code on a GPU: XLA compiles the one
anew for every use, can fuse neither, and both keep their words in memory. This is arithmetic, which
becomes a part of the kernel that uses it; and kernels that are alike are compiled once.
"""

import jax
import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


@jax.jit
def encrypt(key: jax.Array, first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Encrypt pairs of words with a key, shape `(2,)`, or each with its own, `(*n, 2)`; all uint32.

    The words are broadcast against each other and against the keys.
    """
    keys = (key[..., 0], key[..., 1], key[..., 0] ^ key[..., 1] ^ _PARITY)
    first, second = first + keys[0], second + keys[1]
    for i in range(5):
        for distance in _ROTATIONS[i % 2]:
            first = first + second
            rotated = (second << np.uint32(distance)) | (second >> np.uint32(32 - distance))
            second = first ^ rotated
        first = first + keys[(i + 1) % 3]
        second = second + (keys[(i + 2) % 3] + np.uint32(i + 1))
    return first, second
