"""A small team of agents whose server is killed several times, and that still finishes its work.

``team`` has the agents, ``server`` the process that runs them and is killed, ``server_runs`` starts
and kills it, ``proof`` checks that nothing was lost, ``screen`` and ``command`` show it.
"""
