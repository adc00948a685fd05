// Engines prints which tests ran on which engine and accelerator, as a table in
// Markdown, of the file that they reported to (FCVM_TEST_REPORT):
//
//	go run ./test/engines FILE
//	go run ./test/engines -note 'why something did not run' FILE    # adds that
package main

import (
	"flag"
	"fmt"
	"os"

	"fcvm/internal/testreport"
)

func main() {
	note := flag.String("note", "", "add this `REMARK` instead of printing")
	flag.Parse()
	if flag.NArg() != 1 {
		fmt.Fprintln(os.Stderr, "usage: engines [-note REMARK] FILE")
		os.Exit(2)
	}
	if err := run(*note, flag.Arg(0)); err != nil {
		fmt.Fprintln(os.Stderr, "engines: error:", err)
		os.Exit(1)
	}
}

func run(note, path string) error {
	if note != "" {
		if err := os.Setenv(testreport.EnvFile, path); err != nil {
			return err
		}
		return testreport.Append(testreport.Entry{Note: note})
	}
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("read report: %w", err)
	}
	defer f.Close()
	all, err := testreport.Read(f)
	if err != nil {
		return err
	}
	if len(all) == 0 {
		fmt.Println("none")
		return nil
	}
	return testreport.Table(os.Stdout, all)
}
