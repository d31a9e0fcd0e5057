"""Newton-type solvers: DEER, quasi-DEER, ELK, Picard and Jacobi iteration."""
