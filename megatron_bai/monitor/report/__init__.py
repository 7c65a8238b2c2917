"""Write the HTML report of runs."""
