"""A small team of agents that is killed again and again, and finishes its work all the same.

``team`` is what the agents do, ``server`` the process they live in and that gets killed,
``show`` the process that kills it and prints, ``proof`` how it checks that nothing was lost.
"""
