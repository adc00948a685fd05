// Echo sends every UDP datagram back to where it came from.
package main

import (
	"log"
	"net"
)

func main() {
	conn, err := net.ListenPacket("udp", ":7")
	if err != nil {
		log.Fatal(err)
	}
	buf := make([]byte, 64<<10)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			log.Fatal(err)
		}
		if _, err := conn.WriteTo(buf[:n], from); err != nil {
			log.Print(err)
		}
	}
}
