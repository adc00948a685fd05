package qmp

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
)

// MaxLine is the longest message that is read, in bytes. QEMU's own answers to
// the commands that fcvm gives stay below 64 KiB.
const MaxLine = 1 << 20

// Error is QEMU's answer to a command that it could not carry out.
type Error struct {
	// Command that failed.
	Command string
	// Class is QEMU's error class, such as "GenericError".
	Class string
	// Desc is for people.
	Desc string
}

func (e *Error) Error() string { return "qemu: " + e.Command + ": " + e.Desc }

// Event is something that QEMU tells unasked.
type Event struct {
	Name string
	Data json.RawMessage
}

// kind of a message.
type kind int

const (
	greeting kind = iota + 1
	reply
	failure
	event
)

// message is one line from QEMU, after parsing.
type message struct {
	kind kind
	// id of the command that a reply or failure belongs to; 0 when the line
	// has none, as QEMU answers lines that it could not parse.
	id     uint64
	result json.RawMessage
	class  string
	desc   string
	event  Event
}

var errMalformed = errors.New("malformed QMP message")

// parse reads one line. It accepts keys that it does not know, as QMP's
// specification asks of clients.
func parse(line []byte) (message, error) {
	var raw struct {
		QMP    json.RawMessage `json:"QMP"`
		Return json.RawMessage `json:"return"`
		Error  *struct {
			Class string `json:"class"`
			Desc  string `json:"desc"`
		} `json:"error"`
		Event *string         `json:"event"`
		Data  json.RawMessage `json:"data"`
		ID    json.RawMessage `json:"id"`
	}
	// QEMU frames by newline, and sends CR LF.
	line = bytes.TrimSpace(line)
	if err := json.Unmarshal(line, &raw); err != nil {
		return message{}, fmt.Errorf("%w: %w", errMalformed, err)
	}
	m := message{}
	if len(raw.ID) > 0 && json.Unmarshal(raw.ID, &m.id) != nil {
		return message{}, fmt.Errorf("%w: id %.40q", errMalformed, raw.ID)
	}
	switch {
	case raw.Event != nil:
		m.kind, m.event = event, Event{Name: *raw.Event, Data: raw.Data}
	case raw.Error != nil:
		m.kind, m.class, m.desc = failure, raw.Error.Class, raw.Error.Desc
	case raw.Return != nil:
		m.kind, m.result = reply, raw.Return
	case raw.QMP != nil:
		m.kind = greeting
	default:
		return message{}, fmt.Errorf("%w: neither reply nor event: %.80q", errMalformed, line)
	}
	return m, nil
}
