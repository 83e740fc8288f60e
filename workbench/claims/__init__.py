"""Published claims, put to a fair test on any model: ways to steer at equal damage, their effect and their time.

`arms` tunes every way alike, `cache_steering` reports and sets claim beside measurement, `latency` times decoding,
`key_shift` shows why keys are un-rotated. `training_methods` compares ways to train an adapter.
"""
