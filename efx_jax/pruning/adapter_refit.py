"""A of an adapter that repairs a mask with the base fixed: from the spectrum of what is lost, then alternating with B.

Both aim at min ||(mask * (B A) - E) G^(1/2)||, where E `[O,I]` is the target minus the masked base. B has a closed form
for every A (`efx_jax.pruning.recovery.gram_brain_surgeon`).
"""

import jax
import jax.numpy as jnp

from efx_jax.einsum import einsum

Array = jax.Array
_OVERSAMPLING = 8
_PASSES = 4
CG_STEPS = 10


def spectral_a(lost: Array, gram: Array, lora_a: Array) -> Array:
    """The best A of rank R where nothing is masked: Q^T E, Q the leading left singular vectors of E G^(1/2).

    By randomised subspace iteration (arXiv 0909.4061), so that no matrix of O x O or G^(1/2) is needed.

    Args:
        lost: E `[O,I]`.
        gram: G = X^T X `[I,I]`.
        lora_a: the old A `[R,I]`, whose row norms the new A takes.

    Returns:
        `[R,I]`, float32.
    """
    lost = lost.astype(jnp.float32)
    rank = lora_a.shape[0]
    width = min(rank + _OVERSAMPLING, *lost.shape)
    start = jax.random.normal(jax.random.key(0), (lost.shape[0], width), jnp.float32)

    def image(basis: Array) -> Array:
        """E G E^T Q `[O,k]`."""
        return einsum("oi,ik->ok", lost, einsum("ij,jk->ik", gram, einsum("oi,ok->ik", lost, basis)))

    def turn(_: int, basis: Array) -> Array:
        return jnp.linalg.qr(image(basis))[0]

    basis = jax.lax.fori_loop(0, _PASSES, turn, jnp.linalg.qr(start)[0])
    inner = einsum("ok,ol->kl", basis, image(basis))
    # `eigh` orders the vectors by ascending eigenvalue.
    leading = jnp.linalg.eigh((inner + inner.T) / 2)[1][:, ::-1][:, :rank]
    found = einsum("ok,kr,oi->ri", basis, leading, lost)
    # A narrow matrix has fewer directions than the adapter: the remaining rows of A stay as they are.
    found = jnp.concatenate([found, lora_a.astype(jnp.float32)[found.shape[0] :]])
    return with_norms_of(lora_a, found)


def alternate_a(lora_a: Array, lora_b: Array, mask: Array, lost: Array, gram: Array) -> Array:
    """A for a given B, by conjugate gradients on its normal equations, preconditioned by their diagonal.

        B^T [(((B A) * mask) G) * mask] = B^T [(E G) * mask]

    Args:
        lora_a: A `[R,I]` to start from.
        lora_b: B `[O,R]`, in units of scale * B.
        mask: bool `[O,I]`, True = kept.
        lost: E `[O,I]`.
        gram: G = X^T X `[I,I]`.

    Returns:
        `[R,I]`, float32, no worse than `lora_a` but for rounding.
    """

    def back(outputs: Array) -> Array:
        return einsum("or,oi->ri", lora_b, jnp.where(mask, einsum("oi,ij->oj", outputs, gram), 0.0))

    def normal(a: Array) -> Array:
        return back(jnp.where(mask, einsum("or,ri->oi", lora_b, a), 0.0))

    diagonal = einsum("or,oi->ri", lora_b**2, mask.astype(jnp.float32)) * jnp.diagonal(gram)
    safe = jnp.where(diagonal > 0, diagonal, 1.0)
    start = lora_a.astype(jnp.float32)
    # With a tolerance of 0, the next search direction is 0 / 0 where nothing is left to gain.
    tol = float(jnp.finfo(jnp.float32).eps)
    return jax.scipy.sparse.linalg.cg(normal, back(lost), start, tol=tol, maxiter=CG_STEPS, M=lambda r: r / safe)[0]


def with_norms_of(like: Array, lora_a: Array) -> Array:
    """`lora_a [R,I]` with every row scaled to the norm of the same row of `like`; rows of zeros become those of `like`.

    B absorbs the inverse factor, so that training continues with an A of the scale it is used to.
    """
    like = like.astype(jnp.float32)
    norm = jnp.linalg.norm(lora_a, axis=1, keepdims=True)
    scaled = lora_a / jnp.where(norm > 0, norm, 1.0) * jnp.linalg.norm(like, axis=1, keepdims=True)
    return jnp.where(norm > 0, scaled, like)
