"""The shared tier: KV that outlives a process and is read by others, in a folder, a bucket or Redis.

`store` and its kinds know bytes by name, `record` what one object holds, `keys` what it is called, `pace` what it
costs; `Tier` joins them. Nothing here knows pools, engines or requests. Whatever a tier does, or fails to do, is a
miss.
"""
