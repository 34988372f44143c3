"""The protocol of a refit as pure machines: one per role, each a function from (state, event) to (state, actions).

They know no clock, no network and no memory: `weft.session` and `weft.leaders` feed them with what happens and do what
they say. `docs/protocol.md` tells the same in words, and `weft.testing.explorer` tries every order of events.
"""
