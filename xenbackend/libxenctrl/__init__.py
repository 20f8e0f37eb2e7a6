"""The real Xen, through libxenctrl and its companions.

hypervisor.py   one host: its domains, its preflight
domain.py       one domain: the contract's operations
empty.py        the empty domain that a guest is restored into, where no toolstack makes one
refusals.py     why a host or a domain is not fit for paging, in sentences
ring.py         the paging ring over an event channel
native/         the hypercalls, in C
"""
