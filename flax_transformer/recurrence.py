"""The SSRU, a recurrent sub-layer that can take the place of the decoder's self-attention.

It remembers one vector of each sentence, whatever the sentence's length, where self-attention keeps the keys and values
of every earlier position and reads all of them at each step.

Glossary: B batch, D d_model, N hypotheses of each sentence, Q target positions of each hypothesis,
P = Q * N, ordered by position, then by hypothesis.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from flax_transformer.projections import dense


class SSRU(nn.Module):
    """The simpler simple recurrent unit of Kim et al., 2019, section 3.

    The paper is "From Research to Production and Back: Ludicrously Fast Neural Machine Translation".

        forget = sigmoid(x Wf + bf)
        state  = forget * state before + (1 - forget) * x W
        output = relu(state)

    Marian has it as `transformer-decoder-autoreg: rnn` with `dec-cell: ssru`. The state is float32 in every dtype.

    Attributes:
        d_model: width of inputs, state and outputs, D.
        dtype: of the activations.
    """

    d_model: int
    dtype: DTypeLike = "float32"

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "B P D"],
        begins: Bool[Array, "B P"] | None = None,
        before: Float[Array, "B N D"] | None = None,
    ) -> tuple[Float[Array, "B P D"], Float[Array, "B N D"]]:
        """Applies the unit to whole rows at once or, with `before`, to the next positions of every hypothesis.

        Args:
            inputs: one vector for each target position.
            begins: where a sentence begins in its row, so that nothing of the sentence before it is remembered; `None`
                if none begins behind the first position.
            before: the state of each hypothesis before these positions; `None` for zeros, and one hypothesis.

        Returns:
            The outputs, and the state after the last position.
        """
        new = dense(self.d_model, self.dtype, name="input", use_bias=False)(inputs)
        forget = dense(self.d_model, self.dtype, name="forget")(inputs)
        batch, length, width = inputs.shape
        hypotheses = 1 if before is None else before.shape[1]
        shape = (batch, length // hypotheses, hypotheses, width)
        forget = jax.nn.sigmoid(forget.astype(jnp.float32).reshape(shape))
        new = (1.0 - forget) * new.astype(jnp.float32).reshape(shape)
        begun = (jnp.zeros((batch, length), bool) if begins is None else begins).reshape(*shape[:3], 1)
        if before is not None:
            new = new.at[:, 0].add(jnp.where(begun[:, 0], 0.0, forget[:, 0] * before))
        states = scan_states(forget, new, begun)
        return jax.nn.relu(states).astype(self.dtype).reshape(inputs.shape), states[:, -1]


def scan_states(
    forget: Float[Array, "B Q N D"], new: Float[Array, "B Q N D"], begins: Bool[Array, "B Q N 1"]
) -> Float[Array, "B Q N D"]:
    """All states of the recurrence state = forget * state before + new, in a number of rounds that grows as log(Q).

    Args:
        forget: the share of the state before that each position keeps.
        new: what each position adds to it.
        begins: where the state before is dropped, whatever `forget` says.
    """

    def join(earlier: tuple[jax.Array, ...], later: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Of two runs of positions, one behind the other, makes one: its beginnings, what it keeps, its last state."""
        begun, kept, state = later
        # Not a product with zero, which would let NaN and infinities of another sentence through.
        carried = jnp.where(begun, 0.0, kept * earlier[2])
        return earlier[0] | begun, earlier[1] * kept, state + carried

    return jax.lax.associative_scan(join, (begins, forget, new), axis=1)[2]
