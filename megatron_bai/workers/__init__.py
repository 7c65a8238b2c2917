"""Call foreign code, rewards and environments, in processes of its own that can be killed.

A thread could not be stopped, least of all in code in C. Processes are started anew and not forked: the trainer has
threads, collectives and perhaps a GPU. Nothing is pickled; one call a line goes each way as JSON, on pipes of their
own: a function that reads standard input finds its end, and one that prints writes to the log.

    pool.WorkerPool      queue of calls, one thread that serves its workers
    process              one worker as the trainer sees it
    main                 the worker's own side
    outcomes             what both sides say about a call
"""
