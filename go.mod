module fcvm

go 1.26
