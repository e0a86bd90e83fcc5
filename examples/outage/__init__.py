"""The demo: a site sends mail while its ESP is healthy, flaky, dead and well again; then the queue is drained.

``options``   the command line
``settings``  the example site's settings, with the waits shortened
``messages``  what is sent
``phases``    what the ESP does meanwhile
``report``    what came of it, as numbers and as tables
``__main__``  runs it
"""
